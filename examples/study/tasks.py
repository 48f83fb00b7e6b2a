"""Data and models of the study, by the names in its configuration files."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from common import data, models

CHANCE_AUC = 0.5


class Samples(NamedTuple):
    """Inputs and labels of some samples."""

    x: np.ndarray
    y: np.ndarray


class Task(NamedTuple):
    """A learning task: samples, loss and score.

    Attributes:
        train: the samples to train on.
        validation: the samples to choose learning rates on.
        test: the samples to report scores on.
        classes: the number of outputs of a model, or the number of tokens to embed.
        loss: the loss as a function of labels and outputs.
        score: the score as a function of labels and outputs; higher is better.
        worst_score: the score of a model whose outputs are not finite.
    """

    train: Samples
    validation: Samples
    test: Samples
    classes: int
    loss: keras.losses.Loss
    score: Callable[[np.ndarray, np.ndarray], float]
    worst_score: float


def load(content: dict[str, Any]) -> Task:
    """Load a task; the last one loaded is cached.

    Args:
        content: the name of a function in `TASKS`, and keyword arguments for it.
    """
    return _load(json.dumps(content, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _load(content: str) -> Task:
    """Load a task described by JSON, which unlike a dict can be the key of a cache."""
    arguments = json.loads(content)
    return TASKS[arguments.pop("name")](**arguments)


def build(content: dict[str, Any], task: Task) -> keras.Model:
    """Return a new model for a task.

    Args:
        content: the name of a function in `MODELS`, and keyword arguments for it.
        task: the task, which sets the shape of inputs and the number of outputs.
    """
    arguments = dict(content)
    return MODELS[arguments.pop("name")](task, **arguments)


def accuracy(labels: np.ndarray, outputs: np.ndarray) -> float:
    """Return the fraction of samples whose largest output is that of their label."""
    return float(np.mean(np.argmax(outputs, axis=-1) == labels))


def area_under_curve(labels: np.ndarray, outputs: np.ndarray) -> float:
    """Return the area under the ROC curve; outputs are logits."""
    metric = keras.metrics.AUC(num_thresholds=1_000, from_logits=True)
    metric.update_state(labels, outputs)
    return float(metric.result())


def classification(splits: list[Samples], classes: int) -> Task:
    """Return the task to tell classes apart, scored by accuracy."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Task(*splits, classes, loss, accuracy, worst_score=1.0 / classes)


def click_through(splits: list[Samples], tokens: int) -> Task:
    """Return the task to predict a binary label, scored by the area under the ROC curve."""
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return Task(*splits, tokens, loss, area_under_curve, worst_score=CHANCE_AUC)


def mnist1d(samples: int, validation: int = 4_000, test: int = 10_000) -> Task:
    """Return the task to classify the signals of MNIST-1D."""
    x, y = data.generated_mnist1d(samples + validation + test)
    return classification(_split(x, y, samples, validation), classes=10)


def images(dataset: str, samples: int, validation: int, size: int, test: int | None = None) -> Task:
    """Return the task to classify images of a dataset, of which a random part is used.

    Args:
        dataset: "fashion_mnist", or the name of a dataset of tensorflow-datasets with images
            and labels.
        samples: the number of images to train on.
        validation: the number of other images to validate on.
        size: the height and width in pixels to which images are resized, by averaging areas.
        test: the number of images to test on, the first ones of the test split; `None` for all.
    """
    (x, y), test_data, classes = data.image_arrays(dataset)
    x_test, y_test = (part[:test] for part in test_data)
    order = np.random.default_rng(0).permutation(len(x))[: samples + validation]
    x, x_test = (tf.image.resize(part, (size, size), "area").numpy() for part in (x[order], x_test))
    mean, deviation = x[:samples].mean(), x[:samples].std()
    x, x_test = (((part - mean) / deviation).astype("float32") for part in (x, x_test))
    y = y[order]
    splits = [*_split(x, y, samples, validation)[:2], Samples(x_test, y_test)]
    return classification(splits, classes)


def text(length: int, samples: int, validation: int, test: int) -> Task:
    """Return the task to predict the next character in the help that comes with Python.

    Pieces of `length` characters are in random order.
    """
    total = samples + validation + test
    manual = data.python_manual(length, total)
    x, y = next(iter(manual.pairs.batch(total).as_numpy_iterator()))
    order = np.random.default_rng(0).permutation(total)
    return classification(_split(x[order], y[order], samples, validation), manual.characters)


def clicks(samples: int, validation: int, test: int) -> Task:
    """Return the task to predict clicks on generated impressions."""
    x, y, tokens = data.generated_clicks(samples + validation + test)
    return click_through(_split(x, y, samples, validation), tokens)


def ratings(dataset: str, samples: int, validation: int, test: int) -> Task:
    """Return the task to predict whether a user gives a film four stars or more, on MovieLens."""
    x, y, tokens = data.movielens(dataset)
    order = np.random.default_rng(0).permutation(len(x))[: samples + validation + test]
    return click_through(_split(x[order], y[order], samples, validation), tokens)


TASKS: dict[str, Callable[..., Task]] = {
    "mnist1d": mnist1d,
    "images": images,
    "text": text,
    "clicks": clicks,
    "ratings": ratings,
}

MODELS: dict[str, Callable[..., keras.Model]] = {
    "conv_net_1d": lambda task, **a: models.conv_net_1d(task.train.x.shape[1:], task.classes, **a),
    "conv_net_2d": lambda task, **a: models.conv_net_2d(task.train.x.shape[1:], task.classes, **a),
    "resnet": lambda task, **a: models.resnet(task.train.x.shape[1:], task.classes, **a),
    "transformer": lambda task, **a: models.transformer(task.classes, task.train.x.shape[1], **a),
    "click_model": lambda task, **a: models.click_model(task.classes, task.train.x.shape[1], **a),
}


def _split(x: np.ndarray, y: np.ndarray, samples: int, validation: int) -> list[Samples]:
    """Split arrays into samples to train on, samples to validate on, and the rest to test on."""
    end = samples + validation
    spans = (slice(samples), slice(samples, end), slice(end, None))
    return [Samples(x[span], y[span]) for span in spans]
