"""Scalars that differ from step to step."""

from typing import NamedTuple

import tensorflow as tf


class StepScalars(NamedTuple):
    """What changes from step to step besides the gradient."""

    learning_rate: tf.Tensor
    first_average: tf.Tensor | None
    """Whether the next moving average is the first. `None` if there are none."""
    overwrite_with_average: tf.Tensor | None
    """`None` if that never happens."""
    may_step: tf.Tensor | None
    """Whether a step may be taken at all. `None` if it may."""
