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

from keras import ops

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


def scatter(values: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """A vector of `count` numbers, the given ones at their positions, else zeros."""
    if list(indices) == list(range(count)):
        return values
    # Not by indices, which from the host would have to be copied.
    own = dict(zip(indices, ops.unstack(values), strict=True))
    return ops.stack([own.get(i, ops.zeros_like(values[0])) for i in range(count)])


class Coefficients(NamedTuple):
    """What a step multiplies by. Those of a skipped step leave everything as it is.

    Selecting between old and new tensors would do the same, but would cost XLA
    the update in place: measured, several times the time of a step.
    """

    is_taken: Tensor
    learning_rate: Tensor
    momentum: Tensor
    ema_momentum: Tensor


def step_coefficients(
    rule: Rule, learning_rate: Tensor, first_average: Tensor | None, is_taken: Tensor
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
        is_taken=is_taken,
        learning_rate=ops.where(is_taken, learning_rate, zero),
        momentum=ops.where(is_taken, rule.momentum * one, one),
        ema_momentum=ops.where(is_taken, ema_momentum, one),
    )


def descend(
    rule: Rule,
    coefficients: Coefficients,
    weight: Tensor,
    momentum: Tensor | None,
    direction: Tensor,
    decays: bool,
) -> tuple[Tensor, Tensor]:
    """The update itself: returns the new weight and the new momentum."""
    # Adding -0.0 and subtracting 0.0 change no bit, not even the sign of a zero.
    direction = ops.where(coefficients.is_taken, direction, -0.0)
    velocity = direction if momentum is None else coefficients.momentum * momentum + direction
    step = coefficients.momentum * velocity + direction if rule.nesterov else velocity
    if decays and rule.weight_decay is not None and rule.decoupled_weight_decay:
        weight = weight * (1.0 - coefficients.learning_rate * rule.weight_decay)
    return weight - ops.where(
        coefficients.is_taken, coefficients.learning_rate * step, 0.0
    ), velocity


def moving_average(coefficients: Coefficients, average: Tensor, weight: Tensor) -> Tensor:
    """Exponential moving average of the weights."""
    return coefficients.ema_momentum * average + (1.0 - coefficients.ema_momentum) * weight


def filled(value: Tensor, like: Tensor) -> Tensor:
    """A number as a tensor, made where `like` is: from the host it would have to be copied."""
    return value * ops.ones_like(like)


def nonzero(norm: Tensor) -> Tensor:
    """1 for a norm of 0, so that a zero gradient gives a zero direction."""
    return ops.where(norm == 0.0, ops.ones_like(norm), norm)
