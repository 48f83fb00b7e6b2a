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
    """Hyper-parameters of SNGM that stay constant while a compiled step is used.

    They are named like the arguments of `SNGM`, and `None` where one of these is not set.

    Attributes:
        momentum: coefficient of the momentum, 0 for none.
        nesterov: whether to apply Nesterov momentum.
        blockwise: whether each variable's gradient is divided by its own norm instead of by that
            of the whole gradient.
        weight_decay: coefficient of weight decay.
        decoupled_weight_decay: whether the decay multiplies the weights instead of being added to
            the gradient.
        clipnorm: greatest norm of each variable's gradient.
        clipvalue: greatest magnitude of an element.
        global_clipnorm: greatest norm of the whole gradient.
        ema_momentum: weight of the past in the moving averages of the weights.
    """

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
    """Return the dtype to compute with for variables of `dtype`: float32 also for 16-bit ones."""
    return "float64" if dtype == "float64" else "float32"


def changes_gradient(rule: Rule) -> bool:
    """Return whether `final_gradient` changes the gradient of the loss under this rule."""
    is_coupled = rule.weight_decay is not None and not rule.decoupled_weight_decay
    return is_coupled or rule.clipvalue is not None


def scaled(rule: Rule, factor: float) -> Rule:
    """Return the rule that treats a gradient times `factor` as `rule` treats the gradient.

    That is, coupled weight decay and the limits of clipping are multiplied by it, too. What
    enters the momentum is then the same.
    """
    if factor == 1.0:
        return rule

    def times(value: float | None) -> float | None:
        """Multiply an argument by the factor, if it is set."""
        return None if value is None else value * factor

    return rule._replace(
        weight_decay=rule.weight_decay if rule.decoupled_weight_decay else times(rule.weight_decay),
        clipnorm=times(rule.clipnorm),
        clipvalue=times(rule.clipvalue),
        global_clipnorm=times(rule.global_clipnorm),
    )


def final_gradient(rule: Rule, gradient: Tensor, weight: Tensor, decays: bool) -> Tensor:
    """Add coupled weight decay to the gradient of one variable, then clip it by value.

    Args:
        rule: the hyper-parameters.
        gradient: gradient of the loss.
        weight: the variable's value.
        decays: whether weight decay applies to this variable.
    """
    if decays and rule.weight_decay is not None and not rule.decoupled_weight_decay:
        gradient = gradient + rule.weight_decay * weight
    if rule.clipvalue is not None:
        # Elements that are not finite stay, so that the step is skipped.
        clipped = ops.clip(gradient, -rule.clipvalue, rule.clipvalue)
        gradient = ops.where(ops.isfinite(gradient), clipped, gradient)
    return gradient


def scatter(values: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """Return a vector of length `count`, zero except for `values[k]` at position `indices[k]`."""
    if list(indices) == list(range(count)):
        return values
    # Indexing would have to copy the indices from the host.
    by_index = dict(zip(indices, ops.unstack(values), strict=True))
    return ops.stack([by_index.get(i, ops.zeros_like(values[0])) for i in range(count)])


class Coefficients(NamedTuple):
    """Factors that one step multiplies by, scalars on the device.

    In a step that is skipped they leave weights, momentum and averages as they are; where
    `is_taken` is `False` the gradient is left out, too.
    Selecting between old and new tensors would do the same, but would cost XLA
    the update in place: measured, several times the time of a step.

    Attributes:
        is_taken: boolean, `False` if the step is skipped.
        learning_rate: 0 if the step is skipped.
        momentum: factor of the momentum before it; 1 if the step is skipped.
        ema_momentum: weight of the past in the moving averages of the weights; 1 if the step is
            skipped.
    """

    is_taken: Tensor
    learning_rate: Tensor
    momentum: Tensor
    ema_momentum: Tensor


def step_coefficients(
    rule: Rule, learning_rate: Tensor, first_average: Tensor | None, is_taken: Tensor
) -> Coefficients:
    """Return the factors of one step, all in the dtype of `learning_rate`.

    Args:
        rule: the hyper-parameters.
        learning_rate: scalar.
        first_average: boolean scalar, whether the moving averages of the weights begin with
            this update and so become the weights themselves. `None` if none are kept.
        is_taken: boolean scalar, `False` if the step is to be skipped.
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
    """Apply one SNGM update to one variable; return its new weight and its new momentum.

    Args:
        rule: the hyper-parameters.
        coefficients: the factors of this step, in the dtype of `weight`.
        weight: the variable's value.
        momentum: its momentum u, or `None` if none is kept.
        direction: its part of g / norm(g).
        decays: whether weight decay applies to this variable.
    """
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
    """Return the exponential moving average of a weight after it has been updated to `weight`."""
    return coefficients.ema_momentum * average + (1.0 - coefficients.ema_momentum) * weight


def filled(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of the shape, dtype and device of `like`, each element equal to `value`.

    Made from `like`, so that nothing is copied from the host.
    """
    return value * ops.ones_like(like)


def nonzero(norm: Tensor) -> Tensor:
    """Replace a norm of 0 by 1, so that a zero gradient divided by it gives a zero direction."""
    return ops.where(norm == 0.0, ops.ones_like(norm), norm)
