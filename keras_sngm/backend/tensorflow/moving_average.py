"""Exponential moving averages of the weights."""

import tensorflow as tf

from keras_sngm import update_rule
from keras_sngm.backend.common.slot import Slot
from keras_sngm.backend.tensorflow.scalars import StepScalars
from keras_sngm.backend.tensorflow.tensors import assign, for_arithmetic
from keras_sngm.update_rule import Coefficients


def average_new_weight(
    slot: Slot, weight: tf.Tensor, coefficients: Coefficients, scalars: StepScalars
) -> tf.Tensor:
    """Update the moving average of a variable, if it has one, with its new weight.

    Args:
        slot: the variable with its state.
        weight: its new weight.
        coefficients: the factors of this step.
        scalars: the scalars of this step.

    Returns:
        The weight, or its average if `ema_overwrite_frequency` says so.
    """
    if slot.average is None:
        return weight
    average = update_rule.moving_average(coefficients, for_arithmetic(slot.average), weight)
    assign(slot.average, average)
    if scalars.overwrite_with_average is None:
        return weight
    return tf.where(
        tf.logical_and(scalars.overwrite_with_average, coefficients.is_taken), average, weight
    )


def average_unchanged_weight(
    slot: Slot, coefficients: dict[tf.DType, Coefficients], scalars: StepScalars
) -> None:
    """Update the moving average of a weight that is already updated, or had no gradient.

    If `ema_overwrite_frequency` says so, the weight is overwritten by its average.

    Args:
        slot: the variable with its state.
        coefficients: the factors of this step for each dtype.
        scalars: the scalars of this step.
    """
    weight = for_arithmetic(slot.weight)
    averaged = average_new_weight(slot, weight, coefficients[weight.dtype], scalars)
    if averaged is not weight:
        assign(slot.weight, averaged)
