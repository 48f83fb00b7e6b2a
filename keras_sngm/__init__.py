"""SNGM, an optimizer for training at large batch sizes, for Keras 3."""

from keras_sngm.monitoring import GradientNormLogger
from keras_sngm.sngm import SNGM
from keras_sngm.version import __version__

__all__ = ["SNGM", "GradientNormLogger", "__version__"]
