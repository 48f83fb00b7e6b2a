"""SNGM, an optimizer for training at large batch sizes, for Keras 3."""

from keras_sngm.learning_rate import typical_learning_rate
from keras_sngm.monitoring import GradientNormLogger
from keras_sngm.sngm import SNGM
from keras_sngm.suggestion import LearningRateSuggestion, suggest_learning_rate
from keras_sngm.version import __version__

__all__ = [
    "SNGM",
    "GradientNormLogger",
    "LearningRateSuggestion",
    "__version__",
    "suggest_learning_rate",
    "typical_learning_rate",
]
