"""Accumulation of gradients over micro-batches, on each replica by itself."""

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
    """Add one micro-batch to means over `micro_batches`: its values, divided by their number.

    Args:
        replicas: the replicas to act for. Each has its own part of every accumulator.
        accumulators: the variables that hold the means.
        values: a per-replica value to add to each of them.
        micro_batches: number of micro-batches in a mean. 1 adds the values as they are.
    """
    for accumulator, value in zip(accumulators, values, strict=True):
        for total, part in zip(replicas.parts(accumulator), replicas.parts(value), strict=True):
            with tf.device(total.device):
                _add_share(total, part, 1.0 / micro_batches)


def values_of(replicas: Replicas, accumulators: Sequence[keras.Variable]) -> list[Any]:
    """Return the per-replica values of accumulators."""
    values = []
    for accumulator in accumulators:
        parts = []
        for part in replicas.parts(accumulator):
            with tf.device(part.device):
                parts.append(tf.identity(part))
        values.append(replicas.joined(parts))
    return values


def set_to_zero(replicas: Replicas, accumulators: Sequence[keras.Variable]) -> None:
    """Set accumulators to zero on each replica."""
    for part in itertools.chain(*map(replicas.parts, accumulators)):
        with tf.device(part.device):
            part.assign(tf.zeros_like(part))


def _add_share(accumulator: tf.Variable, gradient: Any, share: float) -> None:
    """Add `share * gradient` to an accumulator, without a tensor for the product if it is dense."""
    gradient = tf.cast(gradient, accumulator.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(share, accumulator.dtype)
        accumulator.scatter_add(tf.IndexedSlices(values, gradient.indices, gradient.dense_shape))
    else:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=accumulator.handle, alpha=tf.cast(-share, accumulator.dtype), delta=gradient
        )
