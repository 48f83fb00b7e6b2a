"""What is measured on an update, and how it is laid out in the rows that hold it.

The upper half is arithmetic on tensors, for backends to call; the lower half reads
rows on the host.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

Tensor = Any

BUCKETS = 30
"""Of a histogram; as many as TensorBoard makes by itself."""
DETAILS = ("weight_norm", "update_norm", "momentum_norm", "alignment", "direction_norm")
HISTOGRAM = BUCKETS + 2
"""Length of a histogram: least value, greatest value, counts."""
NOISE_MOMENTS = 3
"""Averages that make up a noise scale: its numerator, its denominator, and 1."""
_MOST_NUMBERS = 2**21
"""On the device. Fewer updates are kept there if each has many numbers."""


class Plan(NamedTuple):
    """What a logger wants to be kept of the updates.

    Attributes:
        per_variable: whether the norm of each variable's gradient is, too.
        details_every: every how many updates `DETAILS` are, if ever.
        histogram_every: every how many updates histograms are, if ever.
        stops: whether no step is to be taken from the first on that has a gradient
            which is not finite.
        least_updates: how many updates must be kept until the rows are fetched.
        most_updates: how many updates are kept if each has few numbers.
    """

    per_variable: bool
    details_every: int | None
    histogram_every: int | None
    stops: bool
    least_updates: int
    most_updates: int

    def updates(self, variables: int) -> int:
        """Return how many updates are kept until the rows are fetched.

        Args:
            variables: how many variables the optimizer has.
        """
        numbers = 4.0 + variables * self.per_variable
        numbers += len(DETAILS) * variables / (self.details_every or math.inf)
        numbers += 2 * HISTOGRAM * variables / (self.histogram_every or math.inf)
        return max(self.least_updates, min(self.most_updates, int(_MOST_NUMBERS / numbers)))


def details(
    before: Tensor, after: Tensor, momentum: Tensor | None, direction: Tensor | None
) -> Tensor:
    """`DETAILS` of one variable; 0 for what it does not have.

    Args:
        before: the variable before the update.
        after: the variable after it.
        momentum: u after the update, or `None`.
        direction: g / norm(g), or `None` if there was no gradient.
    """
    none = ops.zeros_like(before)
    momentum = none if momentum is None else momentum
    direction = none if direction is None else direction
    values = [
        _norm(before),
        _norm(after - before),
        _norm(momentum),
        _total(momentum * direction),
        _norm(direction),
    ]
    return ops.stack([ops.cast(value, "float32") for value in values])


def histogram(tensor: Tensor, segment_sum: Callable[..., Tensor] = ops.segment_sum) -> Tensor:
    """Least value, greatest value, and counts in `BUCKETS` intervals of one width.

    All counts are 0 if an element is not finite, and all is 0 if there are none.

    Args:
        tensor: what to count the elements of.
        segment_sum: as that of Keras.
    """
    if 0 in tensor.shape:
        return ops.zeros((HISTOGRAM,), "float32")
    vector = ops.cast(ops.reshape(tensor, (-1,)), "float32")
    least, greatest = ops.min(vector), ops.max(vector)
    is_finite = ops.isfinite(least) & ops.isfinite(greatest)
    # Halves, as the difference of two float32 numbers need not be one.
    width = (greatest / 2 - least / 2) / BUCKETS
    # Numbers from the host would have to be copied.
    one, zero = ops.ones_like(width), ops.zeros_like(width)
    offsets = (vector / 2 - least / 2) / ops.where(width > 0, width, one)
    offsets = ops.where(is_finite, offsets, zero)
    last = (BUCKETS - 1) * one
    places = ops.cast(ops.where(offsets < last, offsets, last), "int32")
    ones = ops.ones_like(places) * ops.cast(is_finite, "int32")
    counts = segment_sum(ones, places, num_segments=BUCKETS)
    return ops.concatenate([ops.stack([least, greatest]), ops.cast(counts, "float32")])


def _norm(tensor: Tensor) -> Tensor:
    return ops.sqrt(_total(ops.square(tensor)))


def _total(tensor: Tensor) -> Tensor:
    """The sum, in two stages: one number alone would gather too many rounding errors."""
    vector = ops.reshape(tensor, (-1,))
    side = math.isqrt(vector.shape[0])
    square = ops.reshape(vector[: side * side], (side, side))
    return ops.sum(ops.sum(square, axis=0)) + ops.sum(vector[side * side :])


class RowsLostError(RuntimeError):
    """Updates were recorded over others before anybody fetched these."""


class Rows(NamedTuple):
    """Consecutive updates, one row each.

    Attributes:
        norm: vector, of the whole gradient.
        noise_scale: vector, NaN where none is known.
        norms: matrix, of each variable's gradient; without columns if not wanted.
    """

    norm: np.ndarray
    noise_scale: np.ndarray
    norms: np.ndarray


def rows_from(table: np.ndarray, keeps_noise_scale: bool) -> Rows:
    """Read what one optimizer has recorded, a row for each update.

    Args:
        table: norm, noise moments if there are any, and norms if these were planned.
        keeps_noise_scale: whether there are noise moments.
    """
    table = table.astype("float64")
    end = 1 + NOISE_MOMENTS * keeps_noise_scale
    return Rows(table[:, 0], _noise_scale(table[:, 1:end]), table[:, end:])


def _noise_scale(moments: np.ndarray) -> np.ndarray:
    """Return the quotients: NaN where nothing was averaged, infinite if the second is not > 0."""
    scale = np.full(len(moments), np.nan)
    if moments.shape[1]:
        noise, signal, weight = moments.T
        known = weight > 0
        scale[known] = np.inf
        np.divide(noise, signal, out=scale, where=known & (signal > 0))
    return scale


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Join what each of the optimizers of a model has kept of the same updates."""
    return Rows(
        np.sqrt(np.sum([part.norm**2 for part in parts], axis=0)),
        np.fmax.reduce([part.noise_scale for part in parts]),
        np.concatenate([part.norms for part in parts], axis=1),
    )


def named_details(table: np.ndarray, has_momentum: np.ndarray) -> dict[str, float]:
    """What the details of some variables are for all of them together.

    Args:
        table: `DETAILS` of each of the variables.
        has_momentum: whether each of them has one. What is about momentum is left
            out if none has.
    """
    table = table.astype("float64")
    norms = dict(zip(DETAILS, np.sqrt(np.sum(table**2, axis=0)).tolist(), strict=True))
    values = {
        "update_ratio": _quotient(norms["update_norm"], norms["weight_norm"]),
        "update_norm": norms["update_norm"],
        "weight_norm": norms["weight_norm"],
    }
    if has_momentum.any():
        alignment = float(np.sum(table[:, DETAILS.index("alignment")]))
        lengths = norms["momentum_norm"] * norms["direction_norm"]
        values["momentum_norm"] = norms["momentum_norm"]
        values["momentum_cosine"] = _quotient(alignment, lengths)
    return values


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
