"""Steps of SNGM on JAX, and their recording."""

from keras_sngm.backend.jax.optimizer import BackendOptimizer
from keras_sngm.backend.jax.trials import BackendTrials
from keras_sngm.backend.jax.watch import Attachment

__all__ = ["Attachment", "BackendOptimizer", "BackendTrials"]
