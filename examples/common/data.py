"""Data for the examples, as `tf.data` datasets of (input, label) pairs."""

import itertools
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

IMAGE_SIZE = (32, 32)


class Task(NamedTuple):
    """A classification task: three datasets of (input, label) pairs, and their sizes.

    Attributes:
        train: the pairs to train on.
        validation: the pairs to choose hyper-parameters on.
        test: the pairs to report results on.
        input_shape: the shape of one input.
        classes: the number of classes.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    test: tf.data.Dataset
    input_shape: tuple[int, ...]
    classes: int


def load(name: str, quick: bool = False) -> Task:
    """Load MNIST-1D, or any image-classification dataset of tensorflow-datasets."""
    return mnist1d(quick) if name == "mnist1d" else images(name, quick)


def mnist1d(quick: bool = False) -> Task:
    """Return MNIST-1D: 4,000 samples to train on, 4,000 to validate, 10,000 to test.

    The samples are generated on this machine. With `quick`, each dataset has a tenth of them.
    """
    sizes = [400, 400, 1_000] if quick else [4_000, 4_000, 10_000]
    x, y = generated_mnist1d(sum(sizes))
    ends = np.cumsum(sizes)
    splits = [
        tf.data.Dataset.from_tensor_slices((x[end - size : end], y[end - size : end]))
        for size, end in zip(sizes, ends, strict=True)
    ]
    return Task(*splits, input_shape=(40, 1), classes=10)


def generated_mnist1d(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return signals, shape (samples, 40, 1), and their labels, 10 classes.

    The data are generated once and then kept on disk, as it takes a while.
    """
    home = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
    cached = home / "datasets" / f"mnist1d-{samples}.npz"
    if not cached.exists():
        from mnist1d.data import get_dataset_args, make_dataset

        print(f"Generating {samples} samples of MNIST-1D into {cached} ...", flush=True)
        arguments = get_dataset_args()
        arguments.num_samples = samples
        arguments.train_split = 1.0
        made = make_dataset(arguments)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(
            partial, x=made["x"][..., None].astype("float32"), y=made["y"].astype("int32")
        )
        partial.replace(cached)
    with np.load(cached) as file:
        return file["x"], file["y"]


class Text(NamedTuple):
    """A text as training data for the prediction of the next character.

    Attributes:
        pairs: pairs of two sequences of characters, of which the second is one ahead.
        characters: the number of different characters.
    """

    pairs: tf.data.Dataset
    characters: int


def python_manual(length: int, pieces: int) -> Text:
    """Return the help on the Python language, which comes with Python, by character.

    Args:
        length: the number of characters in a piece.
        pieces: the number of pieces, or fewer if the text is too short. They are consecutive.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[: length * pieces + 1]
    alphabet, tokens = np.unique(np.array(list(text)), return_inverse=True)
    tokens = tokens.astype("int32")
    pieces = (len(tokens) - 1) // length
    inputs, labels = (t[: pieces * length].reshape(-1, length) for t in (tokens[:-1], tokens[1:]))
    return Text(tf.data.Dataset.from_tensor_slices((inputs, labels)), len(alphabet))


def images(name: str, quick: bool = False) -> Task:
    """Load an image-classification dataset of tensorflow-datasets.

    Images are resized to 32x32, and pixels are scaled to [-1, 1].

    Args:
        name: the name of the dataset.
        quick: whether to return only the first hundredth of each split.

    Raises:
        ValueError: if the dataset does not consist of images with labels.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            "The dataset must have the features `image` and `label`. "
            f"Received: name={name} with features {list(features)}"
        )
    builder.download_and_prepare()
    datasets = tfds.load(name, split=_splits(builder.info.splits), as_supervised=True)
    if quick:
        datasets = [dataset.take(int(dataset.cardinality()) // 100) for dataset in datasets]
    return Task(
        *(dataset.map(_scaled, num_parallel_calls=tf.data.AUTOTUNE) for dataset in datasets),
        input_shape=(*IMAGE_SIZE, features["image"].shape[-1]),
        classes=features["label"].num_classes,
    )


def image_arrays(name: str) -> tuple[Any, Any, int]:
    """Return (images, labels) to train on, (images, labels) to test on, and the number of classes.

    Fashion-MNIST is loaded from Keras, which does not need tensorflow-datasets. Its images are
    28x28 with pixels from 0 to 255. All other datasets are as `images` returns them.
    """
    if name == "fashion_mnist":
        (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
        labels, test_labels = (part.astype("int32") for part in (y, y_test))
        return (x[..., None], labels), (x_test[..., None], test_labels), 10
    task = images(name)
    return (*(_arrays(part) for part in (task.train, task.test)), task.classes)


def _arrays(dataset: tf.data.Dataset) -> Any:
    """Return a whole dataset as one batch of NumPy arrays."""
    return next(iter(dataset.batch(int(dataset.cardinality())).as_numpy_iterator()))


CLICK_FIELDS = (5_000, 2_000, 200, 24)
"""The number of users, items, pages and hours in `generated_clicks`."""


def generated_clicks(samples: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Generate impressions of a user, an item, a page and an hour, with or without a click.

    Users, items, pages and hours are drawn by Zipf's law. The log-odds of a click are the sum
    of a constant, of one number for each of the four, and for each pair of the four of the dot
    product of two latent vectors. Numbers and vectors are drawn from normal distributions, the
    same at each call.

    Returns:
        User, item, page and hour as indices of one embedding table, shape (samples, 4); 1 for
        a click or 0, shape (samples, 1); the number of rows of the table.
    """
    generator = np.random.default_rng(0)
    own = [generator.normal(0.0, 0.5, size) for size in CLICK_FIELDS]
    latent = [generator.normal(0.0, 0.7, (size, 4)) for size in CLICK_FIELDS]
    picked = [_zipf(generator, size, samples) for size in CLICK_FIELDS]
    log_odds = -1.5 + sum(part[i] for part, i in zip(own, picked, strict=True))
    vectors = [part[i] for part, i in zip(latent, picked, strict=True)]
    for first, second in itertools.combinations(vectors, 2):
        log_odds = log_odds + np.sum(first * second, axis=1)
    clicked = generator.random(samples) < 1.0 / (1.0 + np.exp(-log_odds))
    begins = itertools.accumulate(CLICK_FIELDS[:-1], initial=0)
    x = np.stack([i + begin for i, begin in zip(picked, begins, strict=True)], axis=1)
    return x.astype("int32"), clicked[:, None].astype("float32"), sum(CLICK_FIELDS)


def _zipf(generator: np.random.Generator, size: int, samples: int) -> np.ndarray:
    """Draw indices below `size` by Zipf's law."""
    weights = 1.0 / np.arange(1, size + 1)
    return generator.choice(size, samples, p=weights / weights.sum())


def movielens(name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Load MovieLens ratings: a user, a film, and whether the user gave 4 stars or more.

    Args:
        name: the name of a dataset of tensorflow-datasets, such as "movielens/100k-ratings".

    Returns:
        User and film as indices of one embedding table, shape (samples, 2); 1 for at least 4
        stars or 0, shape (samples, 1); the number of rows of the table.
    """
    import tensorflow_datasets as tfds

    features = ("user_id", "movie_id", "user_rating")
    dataset = tfds.load(name, split="train")
    ratings = _arrays(dataset.map(lambda rating: {key: rating[key] for key in features}))
    columns, tokens = [], 0
    for feature in features[:2]:
        known, column = np.unique(ratings[feature], return_inverse=True)
        columns.append(column + tokens)
        tokens += len(known)
    liked = ratings["user_rating"] >= 4.0
    return np.stack(columns, 1).astype("int32"), liked[:, None].astype("float32"), tokens


def _splits(available: Iterable[str]) -> list[str]:
    """Return the names of the splits to train, validate and test on, in tensorflow-datasets."""
    for held_out in ("test", "validation"):
        if held_out in available:
            return ["train[:90%]", "train[90%:]", held_out]
    return ["train[:80%]", "train[80%:90%]", "train[90%:]"]


def _scaled(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Resize an image to 32x32, and scale its pixels from [0, 255] to [-1, 1]."""
    image = tf.image.resize(image, IMAGE_SIZE)
    return image / 127.5 - 1.0, label
