"""Scalars of a step that differ from one step to the next."""

from typing import NamedTuple

import tensorflow as tf


class StepScalars(NamedTuple):
    """Scalars that change from step to step, besides the gradient."""

    learning_rate: tf.Tensor
    first_average: tf.Tensor | None
    """Boolean, whether the moving averages begin with this step. `None` if none are kept."""
    overwrite_with_average: tf.Tensor | None
    """Boolean, whether weights are overwritten by their averages. `None` if they never are."""
    may_step: tf.Tensor | None
    """Boolean, whether a step may be taken: recorders can forbid it. `None` if none does."""
