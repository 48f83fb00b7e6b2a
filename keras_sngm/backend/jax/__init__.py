"""Steps of SNGM on JAX, and their recording."""

from keras_sngm.backend.jax.optimizer import BackendOptimizer
from keras_sngm.backend.jax.watch import attach, detach, is_current

__all__ = ["BackendOptimizer", "attach", "detach", "is_current"]
