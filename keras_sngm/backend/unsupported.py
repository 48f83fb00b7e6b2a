"""Stand-ins for Keras backends on which SNGM has no step, so that importing it works."""

from typing import Any

import keras

from keras_sngm.measurements import Plan


class BackendOptimizer(keras.optimizers.Optimizer):
    """Optimizer whose constructor raises a `NotImplementedError`: there is no step for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise _not_yet(type(self).__name__)


class Attachment:
    """Attachment whose constructor raises a `NotImplementedError`: nothing can be recorded."""

    def __init__(self, model: keras.Model, plan: Plan, fit_params: Any) -> None:
        raise _not_yet("GradientNormLogger")


class BackendTrials:
    """Trials whose constructor raises a `NotImplementedError`: no step can be taken."""

    def __init__(self, model: keras.Model) -> None:
        raise _not_yet("suggest_learning_rate")


def _not_yet(name: str) -> NotImplementedError:
    """Return the error for a class that the Keras backend in use does not support."""
    return NotImplementedError(
        f"`{name}` runs on the TensorFlow, JAX and PyTorch backends of Keras. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. "
        "Set the environment variable KERAS_BACKEND before importing keras."
    )
