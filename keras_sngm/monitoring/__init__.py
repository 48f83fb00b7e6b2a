"""Logging of gradient norms while a model is trained: the callback, and its work on the host."""

from keras_sngm.monitoring.callback import GradientNormLogger

__all__ = ["GradientNormLogger"]
