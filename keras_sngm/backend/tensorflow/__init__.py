"""Steps of SNGM on TensorFlow, and their recording."""

from keras_sngm.backend.tensorflow.optimizer import BackendOptimizer
from keras_sngm.backend.tensorflow.watch import attach, detach, is_current

__all__ = ["BackendOptimizer", "attach", "detach", "is_current"]
