"""The arithmetic of one SNGM step as pure functions of tensors.

With mini-batch gradient g over all variables w together, momentum u, learning
rate eta and momentum coefficient beta:

    u <- beta * u + g / norm(g)
    w <- w - eta * u

(Zhao, Shi, Xie, Li, "Stochastic normalized gradient descent with momentum for
large-batch training", https://arxiv.org/abs/2007.13985, Algorithm 1.)

Nothing here holds state or knows where a tensor lives.
"""

from collections.abc import Sequence
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
    """The power of two that brought the squares into range: a scalar for all
    variables, or a vector with one per variable."""
    divisor: Tensor
    """direction = gradient * prescale / divisor; a scalar or a vector, too."""
    norms: Tensor
    """Euclidean norm of each variable's gradient after clipping."""
    norm: Tensor
    """Euclidean norm of the whole gradient after clipping."""
    unclipped: Tensor
    """Euclidean norm of the whole gradient before `clipnorm` and `global_clipnorm`."""
    finite: Tensor
    """Whether the step may be taken."""


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


def trusted_range(size: int, tiny: float, epsilon: float) -> float:
    """The least sum of `size` squares that underflow cannot have spoilt.

    Every square below `tiny`, the smallest normal number, may have been lost.
    From the returned value upwards all of them together stay below rounding.
    """
    return max(size, 1) * tiny / epsilon


def rescue_exponent(largest_exponent: int) -> int:
    """The k for which 2^k or 2^-k brings any gradient's squares into range.

    `largest_exponent` is that of the dtype (128 for float32). A sum of squares
    that overflowed belongs to a norm of at least 2^(largest_exponent / 2);
    after 2^-k its square is far from underflow, and so is, the other way
    round, one that was too small to trust after 2^k.
    """
    return 3 * largest_exponent // 4


def trust(squares: Tensor, size: int, blockwise: bool) -> tuple[Tensor, Tensor]:
    """Whether sums of squares can be trusted, and the factor or factors to take them with.

    Args:
        squares: vector, one sum per variable.
        size: the number of elements of all variables.
        blockwise: whether each sum is used by itself, so that each has to be trusted.

    Returns:
        A boolean scalar, and a power of two, 1 if it is true. With `blockwise` a vector of
        such powers.
    """
    total = squares if blockwise else ops.sum(squares)
    limits = np.finfo(backend.standardize_dtype(total.dtype))
    least = trusted_range(size, float(limits.tiny), float(limits.eps))
    rescue = 2.0 ** rescue_exponent(limits.maxexp)
    trusted = ops.logical_and(total >= least, ops.isfinite(total))
    one = ops.ones_like(total)
    factor = ops.where(total < least, rescue * one, one / rescue)
    return ops.all(trusted), ops.where(trusted, one, factor)


def normalization(rule: Rule, squares: Tensor, prescale: Tensor, times: int = 1) -> Normalization:
    """From one sum of squares per variable to the factors that normalize.

    Args:
        squares: vector, the sum of squares of each variable's gradient after
            multiplication by `prescale`.
        prescale: a power of two, 1 on the usual path. With `blockwise` a vector,
            else a scalar.
        times: how many times the gradient that is, as where micro-batches were added up.
            Dividing it would be one more pass over memory.
    """
    normalize = _blockwise_normalization if rule.blockwise else _common_normalization
    return normalize(rule, squares, prescale * times)._replace(prescale=prescale)


def _common_normalization(rule: Rule, squares: Tensor, prescale: Tensor) -> Normalization:
    """As `normalization`, all variables by the norm of the whole gradient."""
    finite = ops.isfinite(ops.sum(squares))
    norms = ops.sqrt(squares)
    unclipped = norm = ops.sqrt(ops.sum(squares))
    if rule.clipnorm is None:
        divisor = nonzero(norm)
    else:
        limit = rule.clipnorm * prescale
        clipped = _at_most(limit, norms)
        norm = _norm_of_norms(clipped)
        divisor = nonzero(norm) * ops.where(norms > limit, norms / limit, _filled(1.0, norms))
        norms = clipped
    if rule.global_clipnorm is not None:
        # A factor common to all variables vanishes in g / norm(g): only the
        # measured norms change.
        clipped = _at_most(rule.global_clipnorm * prescale, norm)
        norms = ops.where(finite, norms / nonzero(norm) * clipped, norms)
        norm = clipped
    return Normalization(
        prescale, divisor, norms / prescale, norm / prescale, unclipped / prescale, finite
    )


def _blockwise_normalization(rule: Rule, squares: Tensor, prescale: Tensor) -> Normalization:
    """As `normalization`, each variable by its own norm, which undoes all clipping of norms."""
    scaled = ops.sqrt(squares)
    norms = scaled / prescale
    unclipped = norm = _norm_of_norms(norms)
    if rule.clipnorm is not None:
        norms = _at_most(rule.clipnorm, norms)
        norm = _norm_of_norms(norms)
    if rule.global_clipnorm is not None:
        clipped = _at_most(rule.global_clipnorm, norm)
        norms = norms / nonzero(norm) * clipped
        norm = clipped
    finite = ops.all(ops.isfinite(squares))
    return Normalization(prescale, nonzero(scaled), norms, norm, unclipped, finite)


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


def _at_most(limit: Tensor, norms: Tensor) -> Tensor:
    """Norms after clipping; infinity and NaN stay, so that they can be seen."""
    # Not `ops.minimum`, which on PyTorch makes float32 of float64.
    over = ops.logical_and(ops.isfinite(norms), norms > limit)
    return ops.where(over, _filled(limit, norms), norms)


def _norm_of_norms(norms: Tensor) -> Tensor:
    """sqrt(sum(norms ** 2)) for norms of any magnitude."""
    largest = ops.max(norms)
    # Into a range where the reciprocal, which XLA multiplies by, does not underflow.
    scale = ops.where(largest > 1.0, _filled(2.0**-32, largest), _filled(2.0**32, largest))
    shares = norms * scale / nonzero(largest * scale)
    return largest * ops.sqrt(ops.sum(ops.square(shares)))
