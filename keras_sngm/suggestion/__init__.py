"""Suggestion of a learning rate by short trainings of the user's own model."""

from keras_sngm.suggestion.result import LearningRateSuggestion
from keras_sngm.suggestion.suggest import suggest_learning_rate

__all__ = ["LearningRateSuggestion", "suggest_learning_rate"]
