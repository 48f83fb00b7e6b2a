"""The callback under the name that pickles of earlier versions know."""

from keras_sngm.monitoring import GradientNormLogger

__all__ = ["GradientNormLogger"]
