"""The gradient noise scale, from how the small batches of an update differ."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.framework.ops import get_default_graph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from keras_sngm import update_rule
from keras_sngm.backend import tensorflow_norm as norm
from keras_sngm.backend.tensorflow_slot import dense, is_accelerator


class NoiseMeter(NamedTuple):
    """How to estimate it.

    Attributes:
        batch_size: samples in one call of the optimizer, all replicas together.
        momentum: weight of the past in the averages.
        replicas: how many there are.
        times: how many calls make up an update.
    """

    batch_size: int
    momentum: float
    replicas: int
    times: int

    def check(self) -> None:
        """Refuse a single small batch, which does not differ from anything."""
        if self.replicas * self.times < 2:
            raise ValueError(
                "`noise_scale_batch_size` needs several batches in each update, to compare them: "
                "set `gradient_accumulation_steps`, train on several replicas, or leave it out. "
                f"Received: noise_scale_batch_size={self.batch_size} without micro-batches, "
                "on 1 replica"
            )

    def estimates(self, total: tf.Tensor, large: tf.Tensor) -> list[tf.Tensor]:
        """Of tr(Sigma) and norm(G)^2.

        Args:
            total: the sum of the squares of the gradients that all replicas had in all
                calls. Keras has divided their losses by the number of replicas.
            large: the squared norm of the gradient of the update.
        """
        count = self.replicas * self.times
        small = total * self.replicas**2 / count
        return update_rule.noise_moments(small, large, count, self.batch_size / self.replicas)

    def update(
        self,
        moments: tf.Variable,
        noise_scale: tf.Variable,
        estimates: Sequence[tf.Tensor],
        taken: tf.Tensor,
    ) -> None:
        """Move the averages of numerator and denominator, and divide them.

        Args:
            moments: averages of tr(Sigma), of norm(G)^2 and of 1, all beginning at 0.
            noise_scale: the quotient of the first two; infinite while the second is not
                positive.
            estimates: of tr(Sigma) and norm(G)^2 in this update.
            taken: whether the update was; else it does not count. Nor does it if a
                square overflowed.
        """
        new = tf.stack([*estimates, tf.ones_like(estimates[0])])
        counts = tf.logical_and(taken, tf.reduce_all(tf.math.is_finite(new)))
        moved = tf.where(counts, self.momentum * moments + (1.0 - self.momentum) * new, moments)
        moments.assign(moved)
        quotient = tf.where(moved[1] > 0, moved[0] / moved[1], math.inf)
        noise_scale.assign(tf.where(counts, quotient, noise_scale))


def sum_of_squares(gradients: Sequence[Any], weights: Sequence[Any], device: str) -> tf.Tensor:
    """Of all elements of some gradients, float32."""
    tensors = [
        tf.cast(dense(gradient, weight.shape), tf.float32)
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
    in_xla = GraphOrParentsInXlaContext(get_default_graph())
    sums, _ = norm.sums_on(is_accelerator(device), in_xla)
    return tf.reduce_sum(sums(tensors))
