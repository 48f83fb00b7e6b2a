"""Stands in on Keras backends that have no step yet, so that importing works."""

from typing import Any

import keras


class BackendOptimizer(keras.optimizers.Optimizer):
    """Refuses to be constructed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"`{type(self).__name__}` runs on the TensorFlow backend of Keras. "
            f"Received: keras.backend.backend()={keras.backend.backend()!r}. "
            "Set the environment variable KERAS_BACKEND=tensorflow before importing keras."
        )
