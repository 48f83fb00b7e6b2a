"""Measurements of the gradient of one update, as tensors on the device."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Tensor, scatter


class Measured(NamedTuple):
    """Tensors that were measured on the gradient of one update.

    Attributes:
        norm: norm of the whole gradient.
        norms: vector, the norm of each variable's gradient, 0 where there was none.
        noise_moments: vector of the averages behind the noise scale: of tr(Sigma), of norm(G)^2
            and of 1; `None` if it is not measured.
        is_finite: boolean, whether all elements of the gradient are finite.
        nonfinite: boolean vector, whether elements of each variable's gradient are not finite.
    """

    norm: Tensor
    norms: Tensor
    noise_moments: Tensor | None
    is_finite: Tensor
    nonfinite: Tensor


def measured_by_sngm(
    optimizer: Any,
    normalized: Normalization,
    indices: Sequence[int],
    on_replica: Callable[[Any], Any] = lambda variable: variable,
) -> Measured:
    """Collect what SNGM has measured in the update that it has just made.

    Args:
        optimizer: an SNGM.
        normalized: how it has normalized the gradient.
        indices: the index of each variable with a gradient among the optimizer's variables.
        on_replica: maps a variable to this replica's copy of it, and `None` for `None`.
    """
    kept = (optimizer.gradient_norm, optimizer.gradient_norms, optimizer.noise_moments)
    norm, norms, moments = (
        None if v is None else keras.ops.convert_to_tensor(on_replica(v)) for v in kept
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
