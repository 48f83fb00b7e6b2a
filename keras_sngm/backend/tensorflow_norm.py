"""Sums of squares that cost one pass over the gradient and survive any magnitude."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sngm import update_rule

Sums = Callable[[Sequence[tf.Tensor]], tf.Tensor]

LANES_ON_CPUS = 16
_LEAST_SIZE_FOR_LANES = 4096
_LARGEST_IN_CACHE = 2**22
"""Elements of all gradients together. Measured on two cores with 32 MB of third-level cache."""


def sums_of_squares(tensors: Sequence[tf.Tensor], stacks: int) -> tf.Tensor:
    """One sum per variable, by TensorFlow's kernels.

    Args:
        tensors: one per variable, but for the last of them.
        stacks: how many tensors at the end belong to one variable per row.
    """
    one_each = tensors[: len(tensors) - stacks]
    sums = [2.0 * tf.stack([tf.nn.l2_loss(tensor) for tensor in one_each])] if one_each else []
    for stack in tensors[len(tensors) - stacks :]:
        sums.append(tf.reduce_sum(tf.square(stack), axis=list(range(1, stack.shape.rank))))
    return tf.concat(sums, 0) if len(sums) > 1 else sums[0]


def sums_of_squares_in_lanes(tensors: Sequence[tf.Tensor], factor: float, lanes: int) -> tf.Tensor:
    """One sum per tensor, each multiplied by the factor first, for XLA.

    On CPUs XLA reduces a tensor to a number on one core and without vector
    instructions, at a fifteenth of the memory's speed. Adding up slices of the
    tensor first is elementwise work, which it does well.
    """
    return tf.stack([_sum_in_lanes(tf.reshape(tensor, [-1]), factor, lanes) for tensor in tensors])


def _sum_in_lanes(vector: tf.Tensor, factor: float, lanes: int) -> tf.Tensor:
    size = vector.shape[0]
    if size < _LEAST_SIZE_FOR_LANES or lanes == 1:
        return tf.reduce_sum(_scaled_squares(vector, factor))
    # Slices are scaled, not the vector: XLA would write that to memory.
    length = size // lanes
    slices = [vector[i * length : (i + 1) * length] for i in range(lanes)]
    squares = [_scaled_squares(part, factor) for part in slices]
    rest = tf.reduce_sum(_scaled_squares(vector[lanes * length :], factor))
    return tf.reduce_sum(functools.reduce(tf.add, squares)) + rest


def _scaled_squares(tensor: tf.Tensor, factor: float) -> tf.Tensor:
    if factor == 1.0:
        return tf.square(tensor)
    # The minimum changes nothing, for the square of the maximum is infinite as well.
    # Without it XLA would multiply by the square of the factor, which overflows.
    return tf.square(tf.minimum(tf.abs(tensor) * factor, tensor.dtype.max))


def squares_and_prescale(
    sums: Sums, sums_if_rescaled: Sums, gradients: Sequence[tf.Tensor], size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The gradients' sums of squares, and the factor by which they were multiplied first.

    Args:
        sums: maps the gradients to a vector of sums of squares, one per variable.
        sums_if_rescaled: the same, for gradients that have to be multiplied.
        gradients: of one dtype.
        size: the number of their elements.

    Returns:
        The vector, and a power of two: 1 unless the squares overflow or are too
        small to trust.
    """
    squares = sums(gradients)
    trusted, prescale = _trust(tf.reduce_sum(squares), size)
    return tf.cond(
        trusted,
        lambda: (squares, tf.ones_like(prescale)),
        lambda: (sums_if_rescaled([gradient * prescale for gradient in gradients]), prescale),
    )


def squares_and_prescale_in_xla(
    gradients: Sequence[tf.Tensor], size: int, lanes: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """As `squares_and_prescale`, compiled by XLA.

    While the gradients stay in the cache, XLA takes longer for a condition than for two
    more sums. Then there are three, for gradients of usual magnitude, for small and for
    large ones, as in Blue, "A portable Fortran program to find the Euclidean norm of a
    vector", 1978, https://doi.org/10.1145/355769.355771.
    """
    sums = functools.partial(sums_of_squares_in_lanes, factor=1.0, lanes=lanes)
    if size > _LARGEST_IN_CACHE:
        # What is hardly ever done is to be compiled fast.
        one_lane = functools.partial(sums_of_squares_in_lanes, factor=1.0, lanes=1)
        return squares_and_prescale(sums, one_lane, gradients, size)
    rescue = _rescue(gradients[0].dtype)
    usual = sums(gradients)
    enlarged = sums_of_squares_in_lanes(gradients, rescue, lanes)
    reduced = sums_of_squares_in_lanes(gradients, 1.0 / rescue, lanes)
    trusted, prescale = _trust(tf.reduce_sum(usual), size)
    rescued = tf.where(prescale == rescue, enlarged, reduced)
    return tf.where(trusted, usual, rescued), tf.where(trusted, tf.ones_like(prescale), prescale)


def rescaled_and_squares(
    sums: Sums, gradients: Sequence[tf.Tensor], size: int
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """As `squares_and_prescale`, together with the gradients multiplied by the factor.

    Not for XLA, which would copy them.
    """
    squares = sums(gradients)
    trusted, prescale = _trust(tf.reduce_sum(squares), size)
    # A condition costs an operation for each tensor that goes in or out, and for
    # each operation in the branch that is not taken. So all gradients pass as one,
    # and the unusual branch is one call.
    usual = tf.experimental.Optional.from_value(tuple(gradients))

    @tf.function(autograph=False, experimental_attributes={"_noinline": True})
    def rescued(gradients: Any, prescale: tf.Tensor) -> tuple[Any, tf.Tensor]:
        rescaled = tuple(gradient * prescale for gradient in gradients.get_value())
        return tf.experimental.Optional.from_value(rescaled), sums(rescaled)

    passed, squares, prescale = tf.cond(
        trusted,
        lambda: (usual, squares, tf.ones_like(prescale)),
        lambda: (*rescued(usual, prescale), prescale),
    )
    return list(passed.get_value()), squares, prescale


def _trust(total: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Whether a sum of squares can be trusted, and the factor to try if not."""
    limits = np.finfo(total.dtype.as_numpy_dtype)
    least = update_rule.trusted_range(size, float(limits.tiny), float(limits.eps))
    rescue = tf.constant(_rescue(total.dtype), total.dtype)
    trusted = tf.logical_and(total >= least, tf.math.is_finite(total))
    return trusted, tf.where(total < least, rescue, 1.0 / rescue)


def _rescue(dtype: tf.DType) -> float:
    """The factor for gradients that are too small; its reciprocal is for those too large."""
    return 2.0 ** update_rule.rescue_exponent(np.finfo(dtype.as_numpy_dtype).maxexp)
