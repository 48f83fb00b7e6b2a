"""The arithmetic of one SNGM step as pure functions of tensors.

With mini-batch gradient g over all variables w together, momentum u, learning
rate eta and momentum coefficient beta:

    u <- beta * u + g / norm(g)
    w <- w - eta * u

(Zhao, Shi, Xie, Li, "Stochastic normalized gradient descent with momentum for
large-batch training", https://arxiv.org/abs/2007.13985, Algorithm 1.)

Nothing here holds state or knows where a tensor lives.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import backend, ops

Tensor = Any


class Rule(NamedTuple):
    """The hyper-parameters that stay constant while a step is compiled."""

    momentum: float
    nesterov: bool
    blockwise: bool
    weight_decay: float | None
    decoupled_weight_decay: bool
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    ema_momentum: float


class Normalization(NamedTuple):
    """How to turn the gradient into a direction, and what was measured on it."""

    prescale: Tensor
    """A power of two that brings the gradient into range, 1 on the usual path: a scalar for
    all variables, or a vector with one per variable."""
    divisor: Tensor
    """direction = gradient * prescale / divisor; a scalar or a vector, too."""
    squares: Tensor
    """Sum of squares of each variable's gradient as they were taken, in whatever unit: finite
    where all elements are."""
    norms: Tensor
    """Euclidean norm of each variable's gradient after clipping, infinite above the dtype."""
    norm: Tensor
    """Euclidean norm of the whole gradient after clipping, infinite above the dtype."""
    unclipped: Tensor
    """Euclidean norm of the whole gradient before `clipnorm` and `global_clipnorm`."""
    finite: Tensor
    """Whether all elements of the gradient are."""
    taken: Tensor
    """Whether the step is taken."""


def arithmetic_dtype(dtype: str) -> str:
    """16-bit variables are stored in 16 bits and computed with in 32."""
    return "float64" if dtype == "float64" else "float32"


def changes_gradient(rule: Rule) -> bool:
    """Whether `final_gradient` is another one than that of the loss."""
    is_coupled = rule.weight_decay is not None and not rule.decoupled_weight_decay
    return is_coupled or rule.clipvalue is not None


def final_gradient(rule: Rule, gradient: Tensor, weight: Tensor, decays: bool) -> Tensor:
    """Add coupled weight decay to the gradient, then clip it by value."""
    if decays and rule.weight_decay is not None and not rule.decoupled_weight_decay:
        gradient = gradient + rule.weight_decay * weight
    if rule.clipvalue is not None:
        # Infinity stays, so that the step is skipped.
        clipped = ops.clip(gradient, -rule.clipvalue, rule.clipvalue)
        gradient = ops.where(ops.isfinite(gradient), clipped, gradient)
    return gradient


@functools.lru_cache(maxsize=256)
def least_sums(sizes: tuple[int, ...], dtype: str, error: float | None = None) -> np.ndarray:
    """The least sums of squares that underflow cannot have spoilt.

    Every square below the smallest normal number may have been lost.

    Args:
        sizes: how many squares are added up in each sum.
        dtype: in which.
        error: how large a part of a sum may be lost. `None` for no more than rounding.
    """
    limits = np.finfo(dtype)
    return np.asarray(sizes, dtype) * (limits.tiny / (error or limits.eps))


def normalization_of(
    rule: Rule,
    squares: Tensor,
    sizes: Sequence[int],
    rescaled_squares: Callable[[Tensor], Tensor],
    cond: Callable[..., Any],
) -> Any:
    """From one sum of squares per variable to the factors that normalize.

    Args:
        rule: the hyper-parameters.
        squares: vector, the sum of squares of each variable's gradient, which may have
            overflowed or lost what is too small.
        sizes: the number of elements of each variable.
        rescaled_squares: takes the sums once more, of each variable's gradient times the
            factor that a vector has for it.
        cond: as `ops.cond`.

    Returns:
        What `cond` makes of a `Normalization`.
    """
    dtype = backend.standardize_dtype(squares.dtype)
    least = ops.convert_to_tensor(least_sums(tuple(sizes), dtype))

    def rescued() -> Normalization:
        factors = rescue_factors(squares, least)
        return normalization(rule, rescaled_squares(factors), factors)

    return cond(trusted(rule, squares, least), lambda: normalization(rule, squares), rescued)


def trusted(rule: Rule, squares: Tensor, least: Tensor) -> Tensor:
    """Whether sums of squares can be used as they are, each by itself and all together.

    Args:
        rule: the hyper-parameters.
        squares: vector, one sum per variable.
        least: what `least_sums` says of them.
    """
    can_be = ops.logical_and(ops.all(squares >= least), ops.isfinite(ops.sum(squares)))
    if rule.clipnorm is not None and rule.clipnorm < 1.0 / _unit_bound(squares):
        # Then no norm is in range once it is clipped.
        return ops.logical_and(can_be, False)
    return can_be


def rescue_factors(squares: Tensor, least: Tensor) -> Tensor:
    """The power of two for each variable that brings the squares of its gradient into range.

    A sum of squares that overflowed belongs to a norm of at least 2^64 (of float32); after
    2^-96 its square is far from underflow, and so is, the other way round, one that was too
    small to trust after 2^96.

    Args:
        squares: vector, one sum per variable.
        least: what `least_sums` says of them.
    """
    up = 2.0 ** (3 * _limits(squares).maxexp // 4)
    one = ops.ones_like(squares)
    factors = ops.where(ops.isfinite(squares), one, one / up)
    return ops.where(squares < least, up * one, factors)


def normalization(rule: Rule, squares: Tensor, factors: Tensor | None = None) -> Normalization:
    """From trustworthy sums of squares, one per variable, to the factors that normalize.

    Args:
        rule: the hyper-parameters.
        squares: vector, the sum of squares of each variable's gradient times its factor.
        factors: vector of powers of two. `None` if all are 1 and their sum is finite.
    """
    scaled = ops.sqrt(squares)
    clips_or_divides_each = rule.blockwise or rule.clipnorm or rule.global_clipnorm
    if factors is None and not clips_or_divides_each:
        norm = ops.sqrt(ops.sum(squares))
        one, finite = ops.ones_like(norm), ops.isfinite(norm)
        return Normalization(one, nonzero(norm), squares, scaled, norm, norm, finite, finite)
    if factors is None:
        factors = ops.ones_like(squares)
    finite = ops.all(ops.isfinite(squares))
    norms = scaled / factors
    unit = _unit(norms, factors < 1.0, factors > 1.0)
    whole = _whole(scaled * (unit / factors), unit)
    prescale, divisor, unclipped = unit, nonzero(whole.norm), whole.norm / unit
    if rule.clipnorm is not None:
        over, norms, whole = _clipped_each(rule.clipnorm, norms, squares)
        shrunk = scaled * (whole.norm / (_in_range(rule.clipnorm, squares) * whole.unit))
        prescale = ops.where(over, factors, _filled(whole.unit, norms))
        divisor = ops.where(over, shrunk, _filled(nonzero(whole.norm), norms))
    norm = whole.norm / whole.unit
    if rule.global_clipnorm is not None:
        norms, norm = _clipped_together(rule.global_clipnorm, norms, norm, whole, finite)
    if rule.blockwise:  # which undoes all clipping of norms
        prescale, divisor = factors, nonzero(scaled)
    return Normalization(prescale, divisor, squares, norms, norm, unclipped, finite, finite)


class _Whole(NamedTuple):
    """The norm of the whole gradient, and what it consists of, times a `unit`.

    With that all of it is in range, and its reciprocal, too, which XLA multiplies by.
    """

    unit: Tensor
    norms: Tensor
    norm: Tensor


def _whole(norms: Tensor, unit: Tensor) -> _Whole:
    """From the norms of all variables times the unit."""
    return _Whole(unit, norms, _norm_of_norms(norms))


def _unit(norms: Tensor, are_large: Tensor, are_small: Tensor) -> Tensor:
    """A power of two for norms of which some are large, or all are small, or neither."""
    one = ops.ones_like(norms[0])
    unit = ops.where(ops.all(are_small), 2.0**32 * one, one)
    return ops.where(ops.any(are_large), 2.0**-32 * one, unit)


def _clipped_each(limit: float, norms: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, _Whole]:
    """Which norms are over the limit, and all norms and that of the whole gradient after it.

    Norms of gradients that are not finite stay, so that they can be seen.
    """
    highest = _filled(_in_range(limit, norms), norms)
    over = ops.logical_and(norms > highest, ops.isfinite(squares))
    clipped = ops.where(over, highest, norms)
    bound = _unit_bound(norms)
    unit = _unit(clipped, clipped > bound, clipped < 1.0 / bound)
    return over, clipped, _whole(clipped * unit, unit)


def _clipped_together(
    limit: float, norms: Tensor, norm: Tensor, whole: _Whole, finite: Tensor
) -> tuple[Tensor, Tensor]:
    """The norms and the norm after `global_clipnorm`.

    A factor common to all variables vanishes in g / norm(g), so nothing else changes.
    """
    highest = _filled(_in_range(limit, norm), norm)
    over = ops.logical_and(norm > highest, finite)
    shares = whole.norms / nonzero(whole.norm)
    return ops.where(over, shares * highest, norms), ops.where(over, highest, norm)


def directions(normalized: Normalization, gradients: Sequence[Tensor]) -> list[Tensor]:
    """g / norm(g), one tensor per variable, in the dtype of each gradient."""
    divisors = _one_each(normalized.divisor, len(gradients))
    prescales = _one_each(normalized.prescale, len(gradients))
    dtype = normalized.divisor.dtype
    # A division, not a product with the reciprocal: graph optimizers would
    # multiply the two scalars first, and 1 / norm(g) can underflow.
    return [
        ops.cast(ops.cast(gradient, dtype) * prescale / divisor, gradient.dtype)
        for gradient, prescale, divisor in zip(gradients, prescales, divisors, strict=True)
    ]


def whole_direction(
    rule: Rule, normalized: Normalization, gradients: Sequence[Tensor]
) -> list[Tensor]:
    """g / norm(g) of the whole gradient, which `directions` are unless the rule is `blockwise`."""
    parts = directions(normalized, gradients)
    if not rule.blockwise:
        return parts
    shares = ops.unstack(normalized.norms / nonzero(normalized.norm))
    return [ops.cast(share, part.dtype) * part for share, part in zip(shares, parts, strict=True)]


def _one_each(factor: Tensor, count: int) -> list[Tensor]:
    return ops.unstack(factor) if len(factor.shape) == 1 else [factor] * count


def spread(values: Tensor, positions: Sequence[int], count: int) -> Tensor:
    """A vector of `count` numbers, the given ones at their positions, else zeros."""
    if list(positions) == list(range(count)):
        return values
    # Not by indices, which from the host would have to be copied.
    own = dict(zip(positions, ops.unstack(values), strict=True))
    return ops.stack([own.get(i, ops.zeros_like(values[0])) for i in range(count)])


def noise_moments(small: Tensor, large: Tensor, count: int, samples: float) -> list[Tensor]:
    """Unbiased estimates of tr(Sigma) and norm(G)^2 from one batch.

    G is the expected gradient, Sigma the covariance of the gradient of one sample
    (McCandlish et al., https://arxiv.org/abs/1812.06162, appendix A.1).

    Args:
        small: mean of the squared norms of the gradients of small batches.
        large: squared norm of the mean of these gradients.
        count: how many small batches there are, at least 2.
        samples: how many samples there are in each.
    """
    between = (small - large) * count / (count - 1)
    return [samples * between, large - between / count]


def noise_averages(
    momentum: float,
    moments: Tensor,
    noise_scale: Tensor,
    estimates: Sequence[Tensor],
    taken: Tensor,
) -> tuple[Tensor, Tensor]:
    """The averages of `noise_moments` and of 1 after an update, and their quotient.

    The quotient is the largest float where the second average is not positive: a number
    that is finite, so that tools which look for others find only faults.

    Args:
        momentum: weight of the past.
        moments: vector, the averages before it.
        noise_scale: the quotient before it.
        estimates: what `noise_moments` has made of the update.
        taken: whether it was; else it does not count, nor does one whose estimates are
            not finite.
    """
    new = ops.stack([*estimates, ops.ones_like(estimates[0])])
    counts = ops.logical_and(taken, ops.all(ops.isfinite(new)))
    moved = ops.where(counts, momentum * moments + (1.0 - momentum) * new, moments)
    positive = moved[1] > 0
    largest = _filled(float(np.finfo(np.float32).max), moved[0])
    quotient = moved[0] / ops.where(positive, moved[1], ops.ones_like(moved[1]))
    quotient = ops.where(ops.logical_and(positive, quotient < largest), quotient, largest)
    return moved, ops.where(counts, quotient, noise_scale)


class Coefficients(NamedTuple):
    """What a step multiplies by. Those of a skipped step leave everything as it is.

    Selecting between old and new tensors would do the same, but would cost XLA
    the update in place: measured, several times the time of a step.
    """

    taken: Tensor
    learning_rate: Tensor
    momentum: Tensor
    ema_momentum: Tensor


def coefficients(
    rule: Rule, learning_rate: Tensor, first_average: Tensor | None, taken: Tensor
) -> Coefficients:
    """In the dtype of `learning_rate`.

    Args:
        learning_rate: scalar.
        first_average: whether no moving average has been taken yet; then it
            becomes the weight itself. `None` if none are kept.
        taken: whether the step is taken or skipped.
    """
    one, zero = ops.ones_like(learning_rate), ops.zeros_like(learning_rate)
    ema_momentum = rule.ema_momentum * one
    if first_average is not None:
        ema_momentum = ops.where(first_average, zero, ema_momentum)
    return Coefficients(
        taken=taken,
        learning_rate=ops.where(taken, learning_rate, zero),
        momentum=ops.where(taken, rule.momentum * one, one),
        ema_momentum=ops.where(taken, ema_momentum, one),
    )


def descend(
    rule: Rule,
    by: Coefficients,
    weight: Tensor,
    momentum: Tensor | None,
    direction: Tensor,
    decays: bool,
) -> tuple[Tensor, Tensor]:
    """The update itself: returns the new weight and the new momentum."""
    # Adding -0.0 and subtracting 0.0 change no bit, not even the sign of a zero.
    direction = ops.where(by.taken, direction, -0.0)
    velocity = direction if momentum is None else by.momentum * momentum + direction
    step = by.momentum * velocity + direction if rule.nesterov else velocity
    if decays and rule.weight_decay is not None and rule.decoupled_weight_decay:
        weight = weight * (1.0 - by.learning_rate * rule.weight_decay)
    return weight - ops.where(by.taken, by.learning_rate * step, 0.0), velocity


def moving_average(by: Coefficients, average: Tensor, weight: Tensor) -> Tensor:
    """Exponential moving average of the weights."""
    return by.ema_momentum * average + (1.0 - by.ema_momentum) * weight


def _filled(value: Tensor, like: Tensor) -> Tensor:
    """A number as a tensor, made where `like` is: from the host it would have to be copied."""
    return value * ops.ones_like(like)


def nonzero(norm: Tensor) -> Tensor:
    """1 for a norm of 0, so that a zero gradient gives a zero direction."""
    return ops.where(norm == 0.0, ops.ones_like(norm), norm)


def _norm_of_norms(norms: Tensor) -> Tensor:
    """sqrt(sum(norms ** 2)) for norms of any magnitude; not finite if one is not."""
    largest = ops.max(norms)
    # Into a range where the reciprocal, which XLA multiplies by, does not underflow.
    scale = ops.where(largest > 1.0, _filled(2.0**-32, largest), _filled(2.0**32, largest))
    shares = norms * scale / nonzero(largest * scale)
    norm = largest * ops.sqrt(ops.sum(ops.square(shares)))
    return ops.where(ops.isfinite(largest), norm, ops.sum(norms))


def _limits(tensor: Tensor) -> np.finfo:
    return np.finfo(backend.standardize_dtype(tensor.dtype))


def _unit_bound(tensor: Tensor) -> float:
    """The greatest norm whose square the tensor's dtype can hold."""
    return 2.0 ** (_limits(tensor).maxexp // 2)


def _in_range(limit: float, like: Tensor) -> float:
    """A limit, or the nearest normal number of a tensor's dtype."""
    limits = _limits(like)
    return min(max(limit, float(limits.tiny)), float(limits.max))
