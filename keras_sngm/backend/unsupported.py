"""Stands in on Keras backends that have no step, so that importing works."""

from typing import Any

import keras

from keras_sngm.measurements import Plan


class BackendOptimizer(keras.optimizers.Optimizer):
    """Refuses to be constructed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise _not_yet(type(self).__name__)


def attach(model: keras.Model, plan: Plan, fit_params: Any) -> Any:
    """Refuses to record."""
    raise _not_yet("GradientNormLogger")


def detach(own: Any) -> None:
    """Do nothing: on this backend `attach` always raises."""


def is_current(own: Any, model: keras.Model) -> bool:
    """Return whether the model is recorded: on this backend it never is."""
    return False


def _not_yet(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"`{name}` runs on the TensorFlow, JAX and PyTorch backends of Keras. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. "
        "Set the environment variable KERAS_BACKEND before importing keras."
    )
