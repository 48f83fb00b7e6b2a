"""Sums of squares that cost one pass over the gradient and survive any magnitude."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier

from keras_sngm import update_rule

Sums = Callable[[Sequence[tf.Tensor]], tf.Tensor]
RescaledSums = Callable[[Sequence[tf.Tensor], tf.Tensor], tf.Tensor]

_LEAST_SIZE_IF_RARE = 1_000_000
_LANES = 16
_LEAST_SIZE = 4096


def sums_on(on_accelerator: bool, in_xla: bool, stacks: int = 0) -> tuple[Sums, RescaledSums]:
    """How to take sums of squares there: of gradients as they are, and times a factor."""
    usual: Sums = functools.partial(sums_of_squares, stacks=stacks)
    rare = usual
    if in_xla and not on_accelerator:
        usual = sums_of_squares_in_lanes
        rare = functools.partial(sums_of_squares_in_lanes, least_size=_LEAST_SIZE_IF_RARE)

    def rescaled(gradients: Sequence[tf.Tensor], factor: tf.Tensor) -> tf.Tensor:
        if in_xla:
            # XLA makes g^2 * factor^2 of (g * factor)^2 if it knows g, and factor^2 is infinite.
            gradients = optimization_barrier(*gradients)
        return rare(_rescaled(gradients, factor, stacks=0))

    return usual, rescaled


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


def sums_of_squares_in_lanes(
    tensors: Sequence[tf.Tensor], least_size: int = _LEAST_SIZE
) -> tf.Tensor:
    """One sum per tensor, for XLA on CPUs.

    There XLA reduces a tensor to a number on one core and without vector
    instructions, at a fifteenth of the memory's speed. Adding up slices of the
    tensor first is elementwise work, which it does well.

    Args:
        tensors: one per variable.
        least_size: smaller tensors are left to XLA's reduction, which is quicker to
            compile. If their elements are computed first, it keeps them in memory.
    """
    vectors = [tf.reshape(tensor, [-1]) for tensor in tensors]
    return tf.stack(
        [
            tf.reduce_sum(tf.square(vector))
            if vector.shape[0] < least_size
            else _sum_of_squares_in_lanes(vector)
            for vector in vectors
        ]
    )


def _sum_of_squares_in_lanes(vector: tf.Tensor) -> tf.Tensor:
    size = vector.shape[0]
    length = size // _LANES
    lanes = [tf.square(vector[i * length : (i + 1) * length]) for i in range(_LANES)]
    rest = tf.reduce_sum(tf.square(vector[_LANES * length :]))
    return tf.reduce_sum(functools.reduce(tf.add, lanes)) + rest


def squares_and_prescale(
    sums: Sums,
    rescaled_sums: RescaledSums,
    gradients: Sequence[tf.Tensor],
    size: int,
    blockwise: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The gradients' sums of squares, and the factor by which they were multiplied first.

    Args:
        sums: maps the gradients to a vector of sums of squares, one per variable.
        rescaled_sums: the same, of gradients times a factor. That is hardly ever needed, so
            it may be slow, but should be quick to compile.
        gradients: of one dtype.
        size: the number of their elements.
        blockwise: whether each sum is used by itself, so that each has to be trusted.

    Returns:
        The vector, and a power of two: 1 unless the squares overflow or are too
        small to trust. With `blockwise` a vector of such powers.
    """
    squares = sums(gradients)
    trusted, prescale = update_rule.trust(squares, size, blockwise)
    squares = tf.cond(
        trusted,
        lambda: squares,
        lambda: rescaled_sums(gradients, prescale),
    )
    return squares, prescale


def rescaled_and_squares(
    sums: Sums, gradients: Sequence[tf.Tensor], size: int, blockwise: bool, stacks: int
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """As `squares_and_prescale`, together with the gradients multiplied by the factor.

    Not for XLA, which would copy them.
    """
    squares = sums(gradients)
    trusted, prescale = update_rule.trust(squares, size, blockwise)
    # A condition costs an operation for each tensor that goes in or out, and for
    # each operation in the branch that is not taken. So all gradients pass as one,
    # and the unusual branch is one call.
    usual = tf.experimental.Optional.from_value(tuple(gradients))

    @tf.function(autograph=False, experimental_attributes={"_noinline": True})
    def rescued(gradients: Any, prescale: tf.Tensor) -> tuple[Any, tf.Tensor]:
        rescaled = tuple(_rescaled(gradients.get_value(), prescale, stacks))
        return tf.experimental.Optional.from_value(rescaled), sums(rescaled)

    passed, squares = tf.cond(trusted, lambda: (usual, squares), lambda: rescued(usual, prescale))
    return list(passed.get_value()), squares, prescale


def _rescaled(tensors: Sequence[tf.Tensor], factors: tf.Tensor, stacks: int) -> list[tf.Tensor]:
    """The tensors times one factor, or times one factor per variable.

    Args:
        tensors: one per variable, but for the last of them.
        factors: a scalar or a vector.
        stacks: how many tensors at the end belong to one variable per row.
    """
    if factors.shape.rank == 0:
        return [tensor * factors for tensor in tensors]
    alone = len(tensors) - stacks
    one_each = tf.unstack(factors[:alone])
    scaled = [tensor * own for tensor, own in zip(tensors[:alone], one_each, strict=True)]
    begin = alone
    for stack in tensors[alone:]:
        rows = stack.shape[0]
        own = tf.reshape(factors[begin : begin + rows], [rows] + [1] * (stack.shape.rank - 1))
        scaled.append(stack * own)
        begin += rows
    return scaled
