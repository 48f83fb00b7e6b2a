"""Keras' own optimizers, made comparable with SNGM.

They get coupled weight decay (Keras' own is decoupled) and a variable
`gradient_norm`, which is what `GradientNormLogger` reads.
"""

import keras
import tensorflow as tf


class Measured:
    """Mixin for a Keras optimizer on TensorFlow.

    Args:
        coupled_weight_decay: `coupled_weight_decay * w` is added to each
            gradient before anything else is done with it.
        *args: and **kwargs: those of the optimizer.
    """

    def __init__(self, *args, coupled_weight_decay=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.coupled_weight_decay = coupled_weight_decay
        self.gradient_norm = self.add_variable(
            (), dtype="float32", aggregation="only_first_replica", name="gradient_norm"
        )

    def apply(self, grads, trainable_variables=None):
        replica = tf.distribute.get_replica_context()
        # Replicas' gradients are summed, so each adds its share of the decay.
        share = self.coupled_weight_decay / replica.num_replicas_in_sync
        grads = [g + share * v for g, v in zip(grads, trainable_variables, strict=True)]
        summed = replica.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        self.gradient_norm.assign(tf.linalg.global_norm(summed))
        super().apply(grads, trainable_variables)


class MomentumSGD(Measured, keras.optimizers.SGD):
    """Momentum SGD."""


class Lamb(Measured, keras.optimizers.Lamb):
    """LAMB, https://arxiv.org/abs/1904.00962."""
