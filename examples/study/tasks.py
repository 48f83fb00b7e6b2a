"""Data and models of the study, by the names that its configuration files use."""

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
    """Inputs and labels."""

    x: np.ndarray
    y: np.ndarray


class Task(NamedTuple):
    """What is learned.

    Attributes:
        train: to train on.
        validation: to choose learning rates on.
        test: to report.
        classes: how many outputs there are, or how many tokens there are to embed.
        loss: of labels and outputs.
        score: of labels and outputs; higher is better.
        worst_score: for a model whose outputs are not finite.
    """

    train: Samples
    validation: Samples
    test: Samples
    classes: int
    loss: keras.losses.Loss
    score: Callable[[np.ndarray, np.ndarray], float]
    worst_score: float


def load(content: dict[str, Any]) -> Task:
    """The task that `content` describes: the name of a function below, and its arguments."""
    return _load(json.dumps(content, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _load(content: str) -> Task:
    arguments = json.loads(content)
    return TASKS[arguments.pop("name")](**arguments)


def build(content: dict[str, Any], task: Task) -> keras.Model:
    """A fresh model for a task, by the name of a function below and its arguments."""
    arguments = dict(content)
    return MODELS[arguments.pop("name")](task, **arguments)


def accuracy(labels: np.ndarray, outputs: np.ndarray) -> float:
    """Share of labels that have the largest output."""
    return float(np.mean(np.argmax(outputs, axis=-1) == labels))


def area_under_curve(labels: np.ndarray, outputs: np.ndarray) -> float:
    """Area under the ROC curve."""
    metric = keras.metrics.AUC(num_thresholds=1_000, from_logits=True)
    metric.update_state(labels, outputs)
    return float(metric.result())


def classification(splits: list[Samples], classes: int) -> Task:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Task(*splits, classes, loss, accuracy, worst_score=1.0 / classes)


def click_through(splits: list[Samples], tokens: int) -> Task:
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return Task(*splits, tokens, loss, area_under_curve, worst_score=CHANCE_AUC)


def mnist1d(samples: int, validation: int = 4_000, test: int = 10_000) -> Task:
    x, y = data.generated_mnist1d(samples + validation + test)
    return classification(_split(x, y, samples, validation), classes=10)


def images(dataset: str, samples: int, validation: int, size: int, test: int | None = None) -> Task:
    """Some images of a dataset.

    Args:
        dataset: "fashion_mnist", or any of tensorflow-datasets with images and labels.
        samples: how many to train on.
        validation: how many others to validate on.
        size: of an image, in pixels each way, after averaging over areas.
        test: how many to test on, the first ones; `None` for all.
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
    """Pieces of the help that comes with Python, in random order; which character follows."""
    total = samples + validation + test
    manual = data.python_manual(length, total)
    x, y = next(iter(manual.pairs.batch(total).as_numpy_iterator()))
    order = np.random.default_rng(0).permutation(total)
    return classification(_split(x[order], y[order], samples, validation), manual.characters)


def clicks(samples: int, validation: int, test: int) -> Task:
    x, y, tokens = data.generated_clicks(samples + validation + test)
    return click_through(_split(x, y, samples, validation), tokens)


def ratings(dataset: str, samples: int, validation: int, test: int) -> Task:
    """Whether a user gives a film four stars or more, from a MovieLens dataset."""
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
    """To train, to validate, and the rest to test on."""
    end = samples + validation
    spans = (slice(samples), slice(samples, end), slice(end, None))
    return [Samples(x[span], y[span]) for span in spans]
