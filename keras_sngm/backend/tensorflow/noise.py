"""Sums of squares of the gradients of small batches, for the gradient noise scale."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.ops import get_default_graph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from keras_sngm.backend.tensorflow import norm
from keras_sngm.backend.tensorflow.tensors import dense, is_accelerator


def sum_of_squares(gradients: Sequence[Any], weights: Sequence[Any], device: str) -> tf.Tensor:
    """Return the sum of the squares of all elements of some gradients, float32.

    Args:
        gradients: dense or sparse gradients.
        weights: their variables, for the shapes.
        device: name of the device that they are on.
    """
    tensors = [
        tf.cast(dense(gradient, weight.shape), tf.float32)
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
    in_xla = GraphOrParentsInXlaContext(get_default_graph())
    sums, _ = norm.sums_on(is_accelerator(device), in_xla)
    return tf.reduce_sum(sums(tensors))
