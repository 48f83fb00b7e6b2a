"""Layout of what is measured on an update, on the device and on the host.

The upper half is arithmetic on tensors, for backends to call; the lower half reads
rows of measurements on the host.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

Tensor = Any

BUCKETS = 30
"""Number of intervals of a histogram, the same as TensorBoard's own."""
DETAILS = ("weight_norm", "update_norm", "momentum_norm", "alignment", "direction_norm")
"""Names of what is measured on one variable around an update; `alignment` is the inner product of
the momentum and the direction."""
HISTOGRAM = BUCKETS + 2
"""Length of a histogram: least value, greatest value, counts."""
NOISE_MOMENTS = 3
"""Averages that make up a noise scale: its numerator, its denominator, and 1."""
_MOST_NUMBERS = 2**21
"""Most numbers kept on the device. Fewer updates are kept if each has many numbers."""


class Plan(NamedTuple):
    """Choice of what a logger keeps of the updates on the device.

    Attributes:
        per_variable: whether the norm of each variable's gradient is kept.
        details_every: number of updates from one set of `DETAILS` to the next, or `None` for
            no details.
        histogram_every: number of updates from one set of histograms to the next, or `None`
            for no histograms.
        stops: whether no step is taken any more from the first gradient on that has elements
            which are not finite.
        least_updates: the least number of updates to keep until the rows are fetched.
        most_updates: the most updates to keep, which holds if each has few numbers.
    """

    per_variable: bool
    details_every: int | None
    histogram_every: int | None
    stops: bool
    least_updates: int
    most_updates: int

    def updates(self, variables: int) -> int:
        """Return the number of updates that are kept on the device until the rows are fetched.

        An update takes at most four numbers besides those of each variable: its norm, and the
        averages behind the noise scale. A variable has histograms of its gradient and of its
        momentum.

        Args:
            variables: the number of variables of the optimizer.
        """
        numbers = 4.0 + variables * self.per_variable
        numbers += len(DETAILS) * variables / (self.details_every or math.inf)
        numbers += 2 * HISTOGRAM * variables / (self.histogram_every or math.inf)
        return max(self.least_updates, min(self.most_updates, int(_MOST_NUMBERS / numbers)))


def details(
    before: Tensor, after: Tensor, momentum: Tensor | None, direction: Tensor | None
) -> Tensor:
    """Measure one variable around an update.

    A value that the variable does not have is 0.

    Args:
        before: the variable before the update.
        after: the variable after it.
        momentum: u after the update, or `None`.
        direction: the variable's part of g / norm(g), the whole gradient divided by its norm, or
            `None` if it had no gradient.

    Returns:
        A float32 vector in the order of `DETAILS`: norms of the weight, of its change and of its
        momentum, the inner product of momentum and direction, and the norm of the direction.
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
    """Return a tensor's least value, its greatest value, and counts in `BUCKETS` equal intervals.

    All counts are 0 if an element is not finite, and the whole vector is 0 if the tensor has
    no elements.

    Args:
        tensor: the tensor whose elements are counted.
        segment_sum: a function like `keras.ops.segment_sum`.
    """
    if 0 in tensor.shape:
        return ops.zeros((HISTOGRAM,), "float32")
    vector = ops.cast(ops.reshape(tensor, (-1,)), "float32")
    least, greatest = ops.min(vector), ops.max(vector)
    is_finite = ops.isfinite(least) & ops.isfinite(greatest)
    # The difference of two float32 numbers can overflow, that of their halves cannot.
    width = (greatest / 2 - least / 2) / BUCKETS
    # Made from a tensor, as numbers would have to be copied from the host.
    one, zero = ops.ones_like(width), ops.zeros_like(width)
    offsets = (vector / 2 - least / 2) / ops.where(width > 0, width, one)
    offsets = ops.where(is_finite, offsets, zero)
    last = (BUCKETS - 1) * one
    places = ops.cast(ops.where(offsets < last, offsets, last), "int32")
    ones = ops.ones_like(places) * ops.cast(is_finite, "int32")
    counts = segment_sum(ones, places, num_segments=BUCKETS)
    return ops.concatenate([ops.stack([least, greatest]), ops.cast(counts, "float32")])


def _norm(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm of all elements of a tensor."""
    return ops.sqrt(_total(ops.square(tensor)))


def _total(tensor: Tensor) -> Tensor:
    """Return the sum of all elements, added up in two stages.

    One running sum over a large tensor would gather too many rounding errors.
    """
    vector = ops.reshape(tensor, (-1,))
    side = math.isqrt(vector.shape[0])
    square = ops.reshape(vector[: side * side], (side, side))
    return ops.sum(ops.sum(square, axis=0)) + ops.sum(vector[side * side :])


class RowsLostError(RuntimeError):
    """An error about updates that were overwritten on the device before they were fetched."""


class Rows(NamedTuple):
    """Measurements of consecutive updates on the host, one element or row per update.

    Attributes:
        norm: vector, the norm of the whole gradient.
        noise_scale: vector, the gradient noise scale, NaN where there is none.
        norms: matrix, the norm of each variable's gradient; without columns if not kept.
    """

    norm: np.ndarray
    noise_scale: np.ndarray
    norms: np.ndarray


def rows_from(table: np.ndarray, keeps_noise_scale: bool) -> Rows:
    """Split a table of what one optimizer has recorded into named measurements.

    Args:
        table: one row per update: the norm of the whole gradient; then, if
            `keeps_noise_scale`, the `NOISE_MOMENTS` averages behind the gradient noise scale;
            then each variable's norm, if these are kept.
        keeps_noise_scale: whether the rows have these averages. Without them the noise scale
            is NaN.
    """
    table = table.astype("float64")
    end = 1 + NOISE_MOMENTS * keeps_noise_scale
    return Rows(table[:, 0], _noise_scale(table[:, 1:end]), table[:, end:])


def _noise_scale(moments: np.ndarray) -> np.ndarray:
    """Divide the averages behind the noise scale, one row per update.

    Args:
        moments: matrix with the columns average of tr(Sigma), average of norm(G)^2 and average of
            1, which is 0 as long as nothing has been averaged; no columns if none are kept.

    Returns:
        A vector: NaN where nothing has been averaged yet or none are kept, infinity where the
        average of norm(G)^2 is not positive.
    """
    scale = np.full(len(moments), np.nan)
    if moments.shape[1]:
        noise, signal, weight = moments.T
        known = weight > 0
        scale[known] = np.inf
        np.divide(noise, signal, out=scale, where=known & (signal > 0))
    return scale


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Combine what the optimizers of one model have recorded of the same updates.

    Each has some of the variables: norms are those of all of these together, the columns of the
    variables follow each other. At most one optimizer measures the noise scale as a rule, the
    others have NaN; of several the greatest is taken.
    """
    return Rows(
        np.sqrt(np.sum([part.norm**2 for part in parts], axis=0)),
        np.fmax.reduce([part.noise_scale for part in parts]),
        np.concatenate([part.norms for part in parts], axis=1),
    )


def named_details(table: np.ndarray, has_momentum: np.ndarray) -> dict[str, float]:
    """Combine details of several variables into values for all of them together, by name.

    Norms are those of all variables together. The momentum's cosine is the sum of inner products
    of momentum and direction, divided by both norms. A quotient by 0 is NaN.

    Args:
        table: matrix with a row of `DETAILS` for each variable: norms of the weight, of its
            update and of its momentum, inner product of momentum and direction, norm of the
            direction. 0 for what a variable does not have.
        has_momentum: boolean vector, which variables have a momentum. Values about the
            momentum are left out if none has.
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
    """Return the quotient of two numbers, NaN if the second is 0."""
    return numerator / denominator if denominator else math.nan
