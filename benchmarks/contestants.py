"""Contestants of the benchmarks: optimizers of Keras, and steps of other libraries."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import keras

from keras_sngm import SNGM
from shapes import Shape

Step = Callable[[], None]

_sgd = partial(keras.optimizers.SGD, 0.01, momentum=0.9)
_DECAY_AND_AVERAGE = {"weight_decay": 1e-4, "use_ema": True}

KERAS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "SNGM": partial(SNGM, 0.01),
    "SGD": _sgd,
    "SGD, clipped": partial(_sgd, global_clipnorm=1.0),
    "Adam": keras.optimizers.Adam,
    "LAMB": keras.optimizers.Lamb,
    "SNGM, decay and average": partial(SNGM, 0.01, **_DECAY_AND_AVERAGE),
    "SGD, decay and average": partial(_sgd, **_DECAY_AND_AVERAGE),
}

MICRO_BATCHES = 4


def accumulating_optimizer(name: str) -> keras.optimizers.Optimizer:
    """Return a Keras optimizer whose accumulation cycle has `MICRO_BATCHES` micro-batches."""
    return KERAS[name](gradient_accumulation_steps=MICRO_BATCHES)


def weights(shapes: Sequence[Shape]) -> list[keras.Variable]:
    """Return variables of the given shapes, filled with ones."""
    return [keras.Variable(keras.initializers.Ones(), shape=shape) for shape in shapes]


class Library(NamedTuple):
    """The package of a contestant that is not a Keras optimizer, and its Keras backend.

    Attributes:
        package: the package to install.
        backend: the Keras backend whose processes may import the package.
    """

    package: str
    backend: str


_LIBRARIES = {"PyTorch": Library("torch", "torch"), "Optax": Library("optax", "jax")}


def backend_of(name: str) -> str:
    """Return the Keras backend whose process takes the steps of a contestant."""
    return _LIBRARIES[name].backend if name in _LIBRARIES else keras.backend.backend()


def contestants_not_installed() -> dict[str, str]:
    """Return the contestants that cannot run, each with its package, which is not installed."""
    return {
        name: library.package
        for name, library in _LIBRARIES.items()
        if importlib.util.find_spec(library.package) is None
    }
