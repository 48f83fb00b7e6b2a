"""Steps of SNGM on TensorFlow, and their recording."""

from keras_sngm.backend.tensorflow.optimizer import BackendOptimizer
from keras_sngm.backend.tensorflow.trials import BackendTrials
from keras_sngm.backend.tensorflow.watch import Attachment

__all__ = ["Attachment", "BackendOptimizer", "BackendTrials"]
