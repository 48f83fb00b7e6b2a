"""A weight with the optimizer's state for it, and the precision it is computed in."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf


class Slot(NamedTuple):
    """A weight and what the optimizer keeps for it on this device."""

    weight: tf.Variable
    momentum: tf.Variable | None
    average: tf.Variable | None
    decays: bool
    constraint: Callable[[tf.Tensor], tf.Tensor] | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.weight.shape.num_elements()


def arithmetic_dtype(dtype: tf.DType) -> tf.DType:
    """16-bit variables are stored in 16 bits and computed with in 32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def for_arithmetic(variable: tf.Variable) -> tf.Tensor:
    """A variable's value in the precision it is computed in."""
    return tf.cast(variable, arithmetic_dtype(variable.dtype))
