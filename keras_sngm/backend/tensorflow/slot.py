"""A weight with the optimizer's state for it, and the precision it is computed in."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_sngm import update_rule


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
    """That in which variables of the given one are computed with."""
    return tf.as_dtype(update_rule.arithmetic_dtype(dtype.name))


def for_arithmetic(variable: tf.Variable) -> tf.Tensor:
    """A variable's value in the precision it is computed in."""
    return tf.cast(variable, arithmetic_dtype(variable.dtype))


def widest(tensors: Sequence[tf.Tensor]) -> tf.DType:
    """The dtype of most bits among theirs."""
    return max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.size)


def dense(gradient: Any, shape: tf.TensorShape) -> tf.Tensor:
    """A gradient, as slices or not, as a tensor of the shape of its variable."""
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.convert_to_tensor(gradient)
    # Duplicate rows of a sparse gradient must be added before a norm is taken, not in 16 bits,
    # and the momentum is dense anyway.
    at_least_float32 = tf.cast(gradient, arithmetic_dtype(gradient.dtype))
    return tf.ensure_shape(tf.convert_to_tensor(at_least_float32), shape)


def of_known_shape(gradient: Any, shape: tf.TensorShape) -> Any:
    """Return a gradient that is known to have the shape of its variable.

    TensorFlow does not know all of it where a layer's input has axes of unknown length. Slices
    need not know it at all.
    """
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values, gradient.indices, tf.constant(list(shape)))
    gradient = tf.convert_to_tensor(gradient)
    if gradient.shape.is_fully_defined():
        return gradient
    return tf.ensure_shape(gradient, shape)


def is_accelerator(device: str) -> bool:
    """Whether the device of this name is not a CPU."""
    return tf.DeviceSpec.from_string(device).device_type not in (None, "CPU")


def assign(variable: tf.Variable, value: tf.Tensor) -> tf.Tensor:
    """Assign a value of any dtype to a variable. Returns the value in the variable's dtype."""
    value = tf.cast(value, variable.dtype)
    variable.assign(value)
    return value
