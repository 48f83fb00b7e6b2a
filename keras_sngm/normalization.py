"""Division of the gradient of a step by its norm, for gradients of any magnitude.

Pure functions of tensors. Nothing here holds state or knows where a tensor lives.

All that makes it right at any magnitude is in one file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import backend, ops

from keras_sngm.update_rule import Rule, Tensor, filled, nonzero


class Normalization(NamedTuple):
    """Factors that turn the gradient of a step into a direction, and what was measured on it.

    Attributes:
        prescale: a power of two that brings the gradient into range, 1 on the usual path: a scalar
            for all variables, or a vector with one per variable.
        divisor: direction = gradient * prescale / divisor; a scalar or a vector, too.
        squares: vector, the sum of squares of each variable's gradient, some of them of the
            gradient times a power of two; finite where all elements of the gradient are.
        norms: vector, the norm of each variable's gradient after clipping, infinite above the
            dtype.
        norm: norm of the whole gradient after clipping, infinite above the dtype.
        unclipped: norm of the whole gradient before `clipnorm` and `global_clipnorm`.
        is_finite: boolean, whether all elements of the gradient are finite.
        is_taken: boolean, whether the step is taken. Like `is_finite`, until a recorder's condition
            is added.
    """

    prescale: Tensor
    divisor: Tensor
    squares: Tensor
    norms: Tensor
    norm: Tensor
    unclipped: Tensor
    is_finite: Tensor
    is_taken: Tensor


@functools.lru_cache(maxsize=256)
def least_reliable_sums(
    sizes: tuple[int, ...], dtype: str, error: float | None = None
) -> np.ndarray:
    """Return the least sum of squares of each variable that underflow cannot have falsified.

    Every square below the smallest normal number of the dtype may have been rounded to zero.

    Args:
        sizes: the number of squares in each sum.
        dtype: the dtype that they are added up in.
        error: the relative error that is allowed in a sum. `None` for rounding errors only.
    """
    limits = np.finfo(dtype)
    return np.asarray(sizes, dtype) * (limits.tiny / (error or limits.eps))


def safe_normalization(
    rule: Rule,
    squares: Tensor,
    sizes: Sequence[int],
    rescaled_squares: Callable[[Tensor], Tensor],
    cond: Callable[..., Any],
) -> Any:
    """Compute the factors that normalize a gradient of any magnitude.

    If a sum of squares has overflowed or is so small that underflow may have falsified it,
    the sums are computed once more from gradients that are rescaled by powers of two.

    Args:
        rule: the hyper-parameters.
        squares: vector, the sum of squares of each variable's gradient.
        sizes: the number of elements of each variable.
        rescaled_squares: given a vector with one factor per variable, computes the sums of
            squares of each variable's gradient times its factor.
        cond: a function like `ops.cond`.

    Returns:
        A `Normalization`, as `cond` returns it.
    """
    dtype = backend.standardize_dtype(squares.dtype)
    least = ops.convert_to_tensor(least_reliable_sums(tuple(sizes), dtype))

    def rescued() -> Normalization:
        """Normalize by the sums of squares of gradients that are rescaled into range."""
        factors = rescaling_factors(squares, least)
        return normalization_from_squares(rule, rescaled_squares(factors), factors)

    return cond(
        squares_are_in_range(rule, squares, least),
        lambda: normalization_from_squares(rule, squares),
        rescued,
    )


def normalization_in_one_pass(
    rule: Rule,
    gradients: Sequence[Tensor],
    sizes: Sequence[int],
    sums: Callable[[Sequence[Tensor]], Tensor],
    hidden: Callable[[list[Tensor]], Sequence[Tensor]],
) -> Normalization:
    """Compute the factors that normalize a gradient of any magnitude, without a branch.

    Each sum of squares is computed of the gradient as it is and of the gradient times two powers
    of two, which a compiler does in one pass. Those that are in range are selected.

    Args:
        rule: the hyper-parameters.
        gradients: tensors of one dtype, one per variable.
        sizes: the number of elements of each variable.
        sums: maps gradients to a vector with the sum of squares of each.
        hidden: returns the same scalars in a way that the compiler does not know their values.
    """
    dtype = backend.standardize_dtype(gradients[0].dtype)
    # A compiler would turn (g * unit)^2 into g^2 * unit^2, which overflows, where it knows the unit
    # or the gradient. So it must know neither the unit nor that the minimum changes nothing.
    numbers = [*rescaling_units(dtype), np.inf]
    up, down, no_limit = hidden([ops.convert_to_tensor(number, dtype) for number in numbers])
    squares = sums(gradients)
    squares_up, squares_down = (
        sums([ops.minimum(gradient * unit, no_limit) for gradient in gradients])
        for unit in (up, down)
    )

    def rescaled_squares(factors: Tensor) -> Tensor:
        """Return for each gradient the sum of squares that belongs to its factor."""
        scaled = ops.where(factors > 1.0, squares_up, squares_down)
        return ops.where(factors == 1.0, squares, scaled)

    return safe_normalization(rule, squares, sizes, rescaled_squares, _select)


def _select(
    condition: Tensor, usual: Callable[[], Normalization], rare: Callable[[], Normalization]
) -> Normalization:
    """Return what one of two functions returns, as a condition would, but call both."""
    return Normalization(
        *(ops.where(condition, *both) for both in zip(usual(), rare(), strict=True))
    )


def squares_are_in_range(rule: Rule, squares: Tensor, least: Tensor) -> Tensor:
    """Return a boolean: whether sums of squares are exact enough as they are, each and in total.

    `False` also if `clipnorm` is so small that the squares of norms clipped to it are out of range.

    Args:
        rule: the hyper-parameters.
        squares: vector, one sum per variable.
        least: vector, the least sum of each variable that can be relied on, as
            `least_reliable_sums` returns it.
    """
    can_be = ops.logical_and(ops.all(squares >= least), ops.isfinite(ops.sum(squares)))
    if rule.clipnorm is not None and rule.clipnorm < 1.0 / _unit_bound(squares):
        # After clipping to this limit no norm is in range.
        return ops.logical_and(can_be, False)
    return can_be


def rescaling_factors(squares: Tensor, least: Tensor) -> Tensor:
    """Return a power of two per variable that brings the squares of its gradient into range.

    The norm of a gradient whose squares overflowed is at least 2^64 (in float32); after
    multiplication with 2^-96 its square is far from underflow. A gradient whose squares were
    too small is multiplied with 2^96, for the same reason.

    Args:
        squares: vector, one sum of squares per variable.
        least: vector, the least sum of each variable that can be relied on, as
            `least_reliable_sums` returns it.
    """
    up, down = rescaling_units(backend.standardize_dtype(squares.dtype))
    one = ops.ones_like(squares)
    factors = ops.where(ops.isfinite(squares), one, down * one)
    return ops.where(squares < least, up * one, factors)


def rescaling_units(dtype: str) -> tuple[float, float]:
    """Return the powers of two that bring small and large gradients into the range of squares.

    These are 2^96 and 2^-96 for float32.
    """
    up = 2.0 ** (3 * np.finfo(dtype).maxexp // 4)
    return up, 1.0 / up


def normalization_from_squares(
    rule: Rule, squares: Tensor, factors: Tensor | None = None
) -> Normalization:
    """Compute the factors that normalize a gradient from sums of squares that are in range.

    Args:
        rule: the hyper-parameters.
        squares: vector, the sum of squares of each variable's gradient times its factor.
        factors: vector of powers of two, one per variable. `None` if all are 1 and the sum
            of `squares` is finite.

    Returns:
        The factors, the norms after clipping, and the norm before it. The step is taken if all
        elements are finite.
    """
    scaled = ops.sqrt(squares)
    clips_or_divides_each = rule.blockwise or rule.clipnorm or rule.global_clipnorm
    if factors is None and not clips_or_divides_each:
        norm = ops.sqrt(ops.sum(squares))
        one, is_finite = ops.ones_like(norm), ops.isfinite(norm)
        return Normalization(one, nonzero(norm), squares, scaled, norm, norm, is_finite, is_finite)
    if factors is None:
        factors = ops.ones_like(squares)
    is_finite = ops.all(ops.isfinite(squares))
    norms = scaled / factors
    unit = _unit(norms, factors < 1.0, factors > 1.0)
    whole = _whole(scaled * (unit / factors), unit)
    prescale, divisor, unclipped = unit, nonzero(whole.norm), whole.norm / unit
    if rule.clipnorm is not None:
        over, norms, whole = _clipped_each(rule.clipnorm, norms, squares)
        shrunk = scaled * (whole.norm / (_in_range(rule.clipnorm, squares) * whole.unit))
        prescale = ops.where(over, factors, filled(whole.unit, norms))
        divisor = ops.where(over, shrunk, filled(nonzero(whole.norm), norms))
    norm = whole.norm / whole.unit
    if rule.global_clipnorm is not None:
        norms, norm = _clipped_together(rule.global_clipnorm, norms, norm, whole, is_finite)
    if rule.blockwise:  # which undoes all clipping of norms
        prescale, divisor = factors, nonzero(scaled)
    return Normalization(prescale, divisor, squares, norms, norm, unclipped, is_finite, is_finite)


class _Whole(NamedTuple):
    """Norm of the whole gradient and the norms that it consists of, all multiplied by `unit`.

    The power of two `unit` brings all of them into range, and their reciprocals, too, which
    XLA multiplies by.
    """

    unit: Tensor
    norms: Tensor
    norm: Tensor


def _whole(norms: Tensor, unit: Tensor) -> _Whole:
    """Combine the norms of all variables to that of the gradient, all multiplied by `unit`."""
    return _Whole(unit, norms, _norm_of_norms(norms))


def _unit(norms: Tensor, are_large: Tensor, are_small: Tensor) -> Tensor:
    """Return the power of two to multiply norms by: 1 unless any is large or all are small.

    Args:
        norms: vector, the norms, for their dtype.
        are_large: boolean vector, which norms have squares that overflow.
        are_small: boolean vector, which norms have squares that underflow.
    """
    one = ops.ones_like(norms[0])
    unit = ops.where(ops.all(are_small), 2.0**32 * one, one)
    return ops.where(ops.any(are_large), 2.0**-32 * one, unit)


def _clipped_each(limit: float, norms: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, _Whole]:
    """Clip the norm of each variable's gradient to `limit`.

    Norms of gradients with elements that are not finite stay as they are, to be visible.

    Args:
        limit: the value of `clipnorm`.
        norms: vector, the norm of each variable's gradient.
        squares: vector of sums of squares, finite where all elements of a gradient are.

    Returns:
        A boolean vector that says which norms were clipped; all norms afterwards; and, as a
        `_Whole`, the norm of the whole gradient afterwards with those that it consists of, times
        a power of two.
    """
    highest = filled(_in_range(limit, norms), norms)
    over = ops.logical_and(norms > highest, ops.isfinite(squares))
    clipped = ops.where(over, highest, norms)
    bound = _unit_bound(norms)
    unit = _unit(clipped, clipped > bound, clipped < 1.0 / bound)
    return over, clipped, _whole(clipped * unit, unit)


def _clipped_together(
    limit: float, norms: Tensor, norm: Tensor, whole: _Whole, is_finite: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each variable's norm and the norm of the whole gradient after `global_clipnorm`.

    A factor common to all variables vanishes in g / norm(g), so nothing else changes.

    Args:
        limit: the value of `global_clipnorm`.
        norms: vector, the norm of each variable's gradient before.
        norm: scalar, the norm of the whole gradient before.
        whole: the same norms, in a unit in which they can be divided.
        is_finite: whether all elements of the gradient are finite.
    """
    highest = filled(_in_range(limit, norm), norm)
    over = ops.logical_and(norm > highest, is_finite)
    shares = whole.norms / nonzero(whole.norm)
    return ops.where(over, shares * highest, norms), ops.where(over, highest, norm)


def unscaled(normalized: Normalization, factor: float) -> Normalization:
    """Return how to normalize a gradient that is `factor` times the one whose norms are wanted.

    The factors that normalize it stay as they are, its norms are divided.

    Args:
        normalized: how to normalize the scaled gradient.
        factor: the number that the gradient was multiplied by.
    """
    if factor == 1.0:
        return normalized
    return normalized._replace(
        norms=normalized.norms / factor,
        norm=normalized.norm / factor,
        unclipped=normalized.unclipped / factor,
    )


def directions(normalized: Normalization, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Divide gradients by their norm, as `normalized` says.

    Returns:
        One tensor per gradient, in its dtype: its part of g / norm(g), or with `blockwise`
        the gradient divided by its own norm.
    """
    divisors = _one_each(normalized.divisor, len(gradients))
    prescales = _one_each(normalized.prescale, len(gradients))
    dtype = normalized.divisor.dtype
    # With a reciprocal graph optimizers would multiply the two scalars first, and
    # 1 / norm(g) can underflow.
    return [
        ops.cast(ops.cast(gradient, dtype) * prescale / divisor, gradient.dtype)
        for gradient, prescale, divisor in zip(gradients, prescales, divisors, strict=True)
    ]


def directions_by_global_norm(
    rule: Rule, normalized: Normalization, gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Divide gradients by the norm of the whole gradient, also if the rule is `blockwise`."""
    parts = directions(normalized, gradients)
    if not rule.blockwise:
        return parts
    shares = ops.unstack(normalized.norms / nonzero(normalized.norm))
    return [ops.cast(share, part.dtype) * part for share, part in zip(shares, parts, strict=True)]


def _one_each(factor: Tensor, count: int) -> list[Tensor]:
    """Return a list with one factor per variable, from a vector of them or from one for all."""
    return ops.unstack(factor) if len(factor.shape) == 1 else [factor] * count


def _norm_of_norms(norms: Tensor) -> Tensor:
    """Return sqrt(sum(norms ** 2)) for norms of any magnitude; not finite if one of them is not."""
    largest = ops.max(norms)
    # The scale brings norms into a range where the reciprocal, which XLA multiplies by, does
    # not underflow.
    scale = ops.where(largest > 1.0, filled(2.0**-32, largest), filled(2.0**32, largest))
    shares = norms * scale / nonzero(largest * scale)
    norm = largest * ops.sqrt(ops.sum(ops.square(shares)))
    return ops.where(ops.isfinite(largest), norm, ops.sum(norms))


def _limits(tensor: Tensor) -> np.finfo:
    """Return the limits of a tensor's floating-point dtype."""
    return np.finfo(backend.standardize_dtype(tensor.dtype))


def _unit_bound(tensor: Tensor) -> float:
    """Return the least power of two whose square the dtype cannot hold: 2^64 for float32."""
    return 2.0 ** (_limits(tensor).maxexp // 2)


def _in_range(limit: float, like: Tensor) -> float:
    """Return `limit`, or the nearest normal number that the dtype of `like` can hold."""
    limits = _limits(like)
    return min(max(limit, float(limits.tiny)), float(limits.max))
