"""Sums of squares that take one pass over the gradient, for gradients of any magnitude."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier

from keras_sngm import normalization
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Rule

Sums = Callable[[Sequence[tf.Tensor]], tf.Tensor]
"""A function from gradients to the sum of squares of each variable."""
RescaledSums = Callable[[Sequence[tf.Tensor], tf.Tensor], tf.Tensor]
"""The same of gradients times a factor for each variable."""

_LEAST_SIZE_IF_RARE = 1_000_000
_LANES = 16
_LEAST_SIZE = 4096


def sums_on(on_accelerator: bool, in_xla: bool) -> tuple[Sums, RescaledSums]:
    """Choose how to compute sums of squares on a kind of device.

    Args:
        on_accelerator: whether the device is not a CPU.
        in_xla: whether XLA compiles the sums.

    Returns:
        A function from gradients to a vector of sums, one per variable; and another that
        takes a vector of factors, too, and multiplies each gradient by its own first.
    """
    usual: Sums = sums_of_squares
    rare = usual
    if in_xla and not on_accelerator:
        usual = sums_of_squares_in_lanes
        rare = functools.partial(sums_of_squares_in_lanes, least_size=_LEAST_SIZE_IF_RARE)

    def rescaled(gradients: Sequence[tf.Tensor], factors: tf.Tensor) -> tf.Tensor:
        """Return the sum of squares of each variable's gradient times its factor."""
        if in_xla:
            # XLA would turn (g * factor)^2 of constants into g^2 * factor^2, which overflows.
            *gradients, factors = optimization_barrier(*gradients, factors)
        return rare(_rescaled(gradients, factors, stacks=0))

    return usual, rescaled


def sums_of_squares(tensors: Sequence[tf.Tensor], stacks: int = 0) -> tf.Tensor:
    """Return a vector of sums of squares, one per variable, by TensorFlow's kernels.

    Args:
        tensors: one tensor per variable, then the stacks.
        stacks: number of tensors, at the end, that hold one variable per row.
    """
    one_each = tensors[: len(tensors) - stacks]
    sums = [2.0 * tf.stack([tf.nn.l2_loss(tensor) for tensor in one_each])] if one_each else []
    for stack in tensors[len(tensors) - stacks :]:
        sums.append(tf.reduce_sum(tf.square(stack), axis=list(range(1, stack.shape.rank))))
    return tf.concat(sums, 0) if len(sums) > 1 else sums[0]


def sums_of_squares_in_lanes(
    tensors: Sequence[tf.Tensor], least_size: int = _LEAST_SIZE
) -> tf.Tensor:
    """Return a vector of sums of squares, one per tensor, in a way that XLA does well on CPUs.

    There XLA reduces a tensor to a number on one core and without vector
    instructions, at a fifteenth of the memory's speed. Adding up slices of the
    tensor first is elementwise work, which it does well.

    Args:
        tensors: one tensor per variable.
        least_size: number of elements below which a tensor is left to XLA's reduction, which
            is quicker to compile.
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
    """Return the sum of the squares of a vector, whose slices are added up element by element."""
    size = vector.shape[0]
    length = size // _LANES
    lanes = [tf.square(vector[i * length : (i + 1) * length]) for i in range(_LANES)]
    rest = tf.reduce_sum(tf.square(vector[_LANES * length :]))
    return tf.reduce_sum(functools.reduce(tf.add, lanes)) + rest


def normalized_on(
    on_accelerator: bool,
    in_xla: bool,
    rule: Rule,
    gradients: Sequence[tf.Tensor],
    sizes: Sequence[int],
) -> Normalization:
    """Compute how to normalize gradients, in the way that suits a kind of device.

    Args:
        on_accelerator: whether the device is not a CPU.
        in_xla: whether XLA compiles this.
        rule: the hyper-parameters.
        gradients: one tensor per variable, all of one dtype.
        sizes: the number of elements of each variable.
    """
    if on_accelerator and in_xla:
        return normalized_in_one_pass(rule, gradients, sizes)
    return normalized_by(*sums_on(on_accelerator, in_xla), rule, gradients, sizes)


def normalized_by(
    sums: Sums,
    rescaled_sums: RescaledSums,
    rule: Rule,
    gradients: Sequence[tf.Tensor],
    sizes: Sequence[int],
) -> Normalization:
    """Compute how to normalize gradients.

    Args:
        sums: maps the gradients to a vector of sums of squares, one per variable.
        rescaled_sums: the same, of gradients times a factor for each variable. That is hardly
            ever needed, so it may be slow, but should be quick to compile.
        rule: the hyper-parameters.
        gradients: the gradients, of one dtype.
        sizes: the number of elements of each variable.
    """
    return normalization.safe_normalization(
        rule, sums(gradients), sizes, lambda factors: rescaled_sums(gradients, factors), tf.cond
    )


def normalized_in_one_pass(
    rule: Rule, gradients: Sequence[tf.Tensor], sizes: Sequence[int]
) -> Normalization:
    """Compute how to normalize gradients without a branch, for accelerators and XLA.

    A branch would make the host wait, or make XLA store gradients that it computes.

    Args:
        rule: the hyper-parameters.
        gradients: one tensor per variable, all of one dtype.
        sizes: the number of elements of each variable.
    """
    return normalization.normalization_in_one_pass(
        rule, gradients, sizes, sums_of_squares, lambda scalars: optimization_barrier(*scalars)
    )


def not_before(
    gradients: Sequence[tf.Tensor], normalized: Normalization
) -> tuple[list[tf.Tensor], Normalization]:
    """Return the same, but have XLA read the gradients anew after normalization.

    What is computed from them both for the norm and for the update is then computed twice. XLA
    would rather store it, which takes the memory of another gradient and the time to move it.
    """
    count = len(gradients)
    values = optimization_barrier(*gradients, *normalized)
    return list(values[:count]), Normalization(*values[count:])


def prescaled_and_normalized(
    rule: Rule, gradients: Sequence[tf.Tensor], sizes: Sequence[int], stacks: int
) -> tuple[list[tf.Tensor], Normalization]:
    """Compute how to normalize gradients, and multiply them by the `prescale`.

    That is a power of two, and differs from 1 only if squares overflow or underflow. Not for XLA,
    which would copy the gradients.

    Args:
        rule: the hyper-parameters.
        gradients: one tensor per variable, then the stacks, all of one dtype.
        sizes: the number of elements of each variable.
        stacks: number of tensors, at the end, that hold one variable per row.

    Returns:
        The multiplied gradients, and the normalization with the `prescale` that was applied.
    """
    # A `tf.cond` costs an operation for each tensor that goes in or out, and for each
    # operation in the branch that is not taken. So all gradients are passed as one value,
    # and the rare branch is one call.
    packed = tf.experimental.Optional.from_value(tuple(gradients))

    @tf.function(autograph=False, experimental_attributes={"_noinline": True})
    def rescaled_sums(gradients: Any, factors: tf.Tensor) -> tf.Tensor:
        """Return the sum of squares of each variable's gradient times its factor."""
        return sums_of_squares(_rescaled(gradients.get_value(), factors, stacks), stacks)

    @tf.function(autograph=False, experimental_attributes={"_noinline": True})
    def prescaled(gradients: Any, prescale: tf.Tensor) -> Any:
        """Multiply packed gradients by one factor for all, or one per variable."""
        values = _rescaled(gradients.get_value(), prescale, stacks)
        return tf.experimental.Optional.from_value(tuple(values))

    def cond(usual: tf.Tensor, act: Callable[[], Any], rescue: Callable[[], Any]) -> Any:
        """Call `act` if `usual` holds, else `rescue`, as `tf.cond` does.

        Both return a `Normalization`. This returns the packed gradients with it, multiplied by its
        `prescale` where `rescue` has made that differ from 1.
        """

        def rescued() -> tuple[Any, Normalization]:
            """Return the multiplied gradients, and the normalization that `rescue` computes."""
            normalized = rescue()
            is_one = tf.reduce_all(normalized.prescale == 1.0)
            passed = tf.cond(is_one, lambda: packed, lambda: prescaled(packed, normalized.prescale))
            return passed, normalized

        return tf.cond(usual, lambda: (packed, act()), rescued)

    passed, normalized = normalization.safe_normalization(
        rule,
        sums_of_squares(gradients, stacks),
        sizes,
        lambda factors: rescaled_sums(packed, factors),
        cond,
    )
    return list(passed.get_value()), normalized


def _rescaled(tensors: Sequence[tf.Tensor], factors: tf.Tensor, stacks: int) -> list[tf.Tensor]:
    """Multiply tensors by one factor, or by one factor per variable.

    Args:
        tensors: one tensor per variable, then the stacks.
        factors: a scalar, or a vector with one factor per variable.
        stacks: number of tensors, at the end, that hold one variable per row.
    """
    if factors.shape.rank == 0:
        return [tensor * factors for tensor in tensors]
    alone = len(tensors) - stacks
    one_each = tf.unstack(factors[:alone])
    scaled = [tensor * factor for tensor, factor in zip(tensors[:alone], one_each, strict=True)]
    begin = alone
    for stack in tensors[alone:]:
        rows = stack.shape[0]
        column = tf.reshape(factors[begin : begin + rows], [rows] + [1] * (stack.shape.rank - 1))
        scaled.append(stack * column)
        begin += rows
    return scaled


def part_of(normalized: Normalization, span: slice) -> Normalization:
    """Return a normalization with the factors of the variables in `span` only."""
    return normalized._replace(
        prescale=_select(normalized.prescale, span), divisor=_select(normalized.divisor, span)
    )


def _select(factor: tf.Tensor, span: slice) -> tf.Tensor:
    """Return the slice of a vector, or a scalar as it is."""
    return factor if factor.shape.rank == 0 else factor[span]
