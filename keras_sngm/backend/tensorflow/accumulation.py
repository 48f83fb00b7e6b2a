"""Accumulation of gradients over micro-batches."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_sngm.backend.tensorflow.replicas import Replicas


def add_to_means(
    replicas: Replicas,
    accumulators: Sequence[keras.Variable],
    values: Sequence[Any],
    micro_batches: int,
) -> None:
    """Add one micro-batch of `micro_batches` to means: its values, divided by their number.

    Args:
        replicas: those that act in this call. Each has a part of its own of every accumulator.
        accumulators: the variables that hold the means.
        values: what to add to each of them, one value per replica.
        micro_batches: how many micro-batches the means are of. 1 adds the values as they are.
    """
    for accumulator, value in zip(accumulators, values, strict=True):
        for own, part in zip(replicas.parts(accumulator), replicas.parts(value), strict=True):
            with tf.device(own.device):
                _add_share(own, part, 1.0 / micro_batches)


def values_of(replicas: Replicas, accumulators: Sequence[keras.Variable]) -> list[Any]:
    """Return what accumulators hold on each replica."""
    values = []
    for accumulator in accumulators:
        parts = []
        for part in replicas.parts(accumulator):
            with tf.device(part.device):
                parts.append(tf.identity(part))
        values.append(replicas.joined(parts))
    return values


def set_to_zero(replicas: Replicas, accumulators: Sequence[keras.Variable]) -> None:
    """Reset accumulators on each replica."""
    for part in itertools.chain(*map(replicas.parts, accumulators)):
        with tf.device(part.device):
            part.assign(tf.zeros_like(part))


def _add_share(accumulator: tf.Variable, gradient: Any, share: float) -> None:
    """Add a part of the gradient, without a tensor for that part."""
    gradient = tf.cast(gradient, accumulator.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(share, accumulator.dtype)
        accumulator.scatter_add(tf.IndexedSlices(values, gradient.indices, gradient.dense_shape))
    else:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=accumulator.handle, alpha=tf.cast(-share, accumulator.dtype), delta=gradient
        )
