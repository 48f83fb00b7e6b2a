"""SNGM, an optimizer for training at large batch sizes, for Keras 3."""

from keras_sngm.callbacks import GradientNormLogger
from keras_sngm.sngm import SNGM

__version__ = "0.1.0"

__all__ = ["SNGM", "GradientNormLogger"]
