"""The gradient noise scale, from what the small batches of an update have in common."""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.ops import get_default_graph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from keras_sngm.backend import tensorflow_norm as norm
from keras_sngm.backend.tensorflow_slot import dense, is_accelerator


def sum_of_squares(gradients: Sequence[Any], weights: Sequence[Any], device: str) -> tf.Tensor:
    """Of all elements of some gradients, float32."""
    tensors = [
        tf.cast(dense(gradient, weight.shape), tf.float32)
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
    in_xla = GraphOrParentsInXlaContext(get_default_graph())
    sums, _ = norm.sums_on(is_accelerator(device), in_xla)
    return tf.reduce_sum(sums(tensors))


def update(
    moments: tf.Variable,
    noise_scale: tf.Variable,
    estimates: Sequence[tf.Tensor],
    momentum: float,
    taken: tf.Tensor,
) -> None:
    """Move the averages of numerator and denominator, and divide them.

    Args:
        moments: averages of tr(Sigma), of norm(G)^2 and of 1, all beginning at 0.
        noise_scale: the quotient of the first two; infinite while the second is not
            positive.
        estimates: of tr(Sigma) and norm(G)^2 in this update.
        momentum: weight of the past.
        taken: whether the update was; else it does not count. Nor does it if a square
            overflowed.
    """
    new = tf.stack([*estimates, tf.ones_like(estimates[0])])
    counts = tf.logical_and(taken, tf.reduce_all(tf.math.is_finite(new)))
    moved = tf.where(counts, momentum * moments + (1.0 - momentum) * new, moments)
    moments.assign(moved)
    quotient = tf.where(moved[1] > 0, moved[0] / moved[1], math.inf)
    noise_scale.assign(tf.where(counts, quotient, noise_scale))
