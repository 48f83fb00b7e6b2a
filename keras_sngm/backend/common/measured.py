"""Measurements of the gradient of one update, as tensors on the device."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Tensor, scatter


class Measured(NamedTuple):
    """Tensors that were measured on the gradient of one update."""

    norm: Tensor
    """Norm of the whole gradient."""
    norms: Tensor
    """Vector, the norm of each variable's gradient, 0 where there was none."""
    noise_moments: Tensor | None
    """Vector, the averages behind the noise scale; `None` if it is not measured."""
    is_finite: Tensor
    """Boolean, whether all elements of the gradient are finite."""
    nonfinite: Tensor
    """Boolean vector, whether elements of each variable's gradient are not finite."""


def measured_by_sngm(
    optimizer: Any,
    normalized: Normalization,
    indices: Sequence[int],
    local: Callable[[Any], Any] = lambda variable: variable,
) -> Measured:
    """Collect what SNGM has measured in the update that it has just made.

    Args:
        optimizer: an SNGM.
        normalized: how it has normalized the gradient.
        indices: the index of each variable with a gradient among the optimizer's variables.
        local: returns this replica's copy of a variable, and `None` for `None`.
    """
    kept = (optimizer.gradient_norm, optimizer.gradient_norms, optimizer.noise_moments)
    norm, norms, moments = (
        None if v is None else keras.ops.convert_to_tensor(local(v)) for v in kept
    )
    nonfinite = nonfinite_mask(normalized, indices, len(optimizer._trainable_variables))
    return Measured(norm, norms, moments, normalized.is_finite, nonfinite)


def nonfinite_mask(normalized: Normalization, indices: Sequence[int], count: int) -> Tensor:
    """Return a boolean vector: which of `count` variables have a gradient that is not finite.

    Args:
        normalized: what was measured of the variables that have a gradient.
        indices: the index of each of these.
        count: number of all variables.
    """
    nonfinite = keras.ops.logical_not(keras.ops.isfinite(normalized.squares))
    return scatter(nonfinite, indices, count)
