"""The optimizers of Keras that are compared, and the contestants of other libraries."""

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


def accumulating(name: str) -> keras.optimizers.Optimizer:
    return KERAS[name](gradient_accumulation_steps=MICRO_BATCHES)


def weights(shapes: Sequence[Shape]) -> list[keras.Variable]:
    return [keras.Variable(keras.initializers.Ones(), shape=shape) for shape in shapes]


class Library(NamedTuple):
    """The package that a contestant is from, and the backend whose processes import it."""

    package: str
    backend: str


_OTHERS = {"PyTorch": Library("torch", "torch"), "Optax": Library("optax", "jax")}


def backend_of(name: str) -> str:
    """Return the backend whose process takes the steps of a contestant."""
    return _OTHERS[name].backend if name in _OTHERS else keras.backend.backend()


def missing() -> dict[str, str]:
    """Return the contestants whose package is not installed, with its name."""
    return {
        name: library.package
        for name, library in _OTHERS.items()
        if importlib.util.find_spec(library.package) is None
    }
