"""Variables and gradients of TensorFlow: dtypes, shapes, devices, assignment."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_sngm import update_rule


def arithmetic_dtype(dtype: tf.DType) -> tf.DType:
    """Return the dtype to compute with for variables of `dtype`: float32 also for 16-bit ones."""
    return tf.as_dtype(update_rule.arithmetic_dtype(dtype.name))


def for_arithmetic(variable: tf.Variable) -> tf.Tensor:
    """Return a variable's value, as float32 if it has 16 bits, else in its own dtype."""
    return tf.cast(variable, arithmetic_dtype(variable.dtype))


def widest(tensors: Sequence[tf.Tensor]) -> tf.DType:
    """Return the dtype of most bits among those of the tensors."""
    return max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.size)


def dense(gradient: Any, shape: tf.TensorShape) -> tf.Tensor:
    """Return a gradient as a dense tensor; duplicate rows are added up, not in 16 bits."""
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.convert_to_tensor(gradient)
    # Duplicate rows must be added up before a norm is taken. The momentum is dense anyway.
    at_least_float32 = tf.cast(gradient, arithmetic_dtype(gradient.dtype))
    return tf.ensure_shape(tf.convert_to_tensor(at_least_float32), shape)


def of_known_shape(gradient: Any, shape: tf.TensorShape) -> Any:
    """Return the gradient, known to have the shape of its variable while a graph is traced.

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
    """Return whether the device of this name is not a CPU."""
    return tf.DeviceSpec.from_string(device).device_type not in (None, "CPU")


def assign(variable: tf.Variable, value: tf.Tensor) -> tf.Tensor:
    """Assign a value of any dtype to a variable. Returns the value in the variable's dtype."""
    value = tf.cast(value, variable.dtype)
    variable.assign(value)
    return value
