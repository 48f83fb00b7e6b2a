"""Keras' own optimizers, made comparable with SNGM: with coupled weight decay.

Keras' own weight decay is decoupled.
"""

import keras
import tensorflow as tf


class CoupledDecay:
    """Mixin for a Keras optimizer on TensorFlow.

    Args:
        coupled_weight_decay: `coupled_weight_decay * w` is added to each
            gradient before anything else is done with it.
        *args: and **kwargs: those of the optimizer.
    """

    def __init__(self, *args, coupled_weight_decay=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.coupled_weight_decay = coupled_weight_decay

    def apply(self, grads, trainable_variables=None):
        # Replicas' gradients are summed, so each adds its share of the decay.
        replicas = tf.distribute.get_replica_context().num_replicas_in_sync
        share = self.coupled_weight_decay / replicas
        grads = [g + share * v for g, v in zip(grads, trainable_variables, strict=True)]
        super().apply(grads, trainable_variables)


class MomentumSGD(CoupledDecay, keras.optimizers.SGD):
    """Momentum SGD."""


class Lamb(CoupledDecay, keras.optimizers.Lamb):
    """LAMB, https://arxiv.org/abs/1904.00962."""
