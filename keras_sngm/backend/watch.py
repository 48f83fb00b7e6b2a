"""Which optimizers of a model are recorded, how that begins and ends, and what is measured.

SNGM calls its recorders itself. The `apply` of any other optimizer is wrapped while a
recorder is attached to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_sngm import update_rule
from keras_sngm.backend.optimizer import WholeModelOptimizer
from keras_sngm.backend.recorder import Measured, attached
from keras_sngm.measurements import Plan
from keras_sngm.update_rule import Tensor

_AS_IT_IS = update_rule.Rule(0.0, False, False, None, True, None, None, None, 0.0)


def recorders(model: keras.Model, plan: Plan, make: Callable[..., Any]) -> list[Any]:
    """One made for each optimizer that updates variables."""
    guarded = model.non_trainable_weights if plan.stops else []
    return [make(optimizer, plan, guarded) for optimizer in updating(model.optimizer)]


def left_over(model: keras.Model, fit: Any) -> list[Any]:
    """The recorders that another `fit` than this one has not detached."""
    optimizers = updating(model.optimizer)
    return [one for optimizer in optimizers for one in attached(optimizer) if one.fit is not fit]


def begin(recorder: Any, wrap: Callable[[Any], Callable[..., None]], fit: Any) -> None:
    """Have a recorder called in each update.

    Args:
        recorder: one that is not attached.
        wrap: makes of another optimizer than SNGM what takes the place of its `apply`.
        fit: what this `fit` has in common with no other.
    """
    recorder.fit, optimizer = fit, recorder.optimizer()
    attached(optimizer).append(recorder)
    if not isinstance(optimizer, WholeModelOptimizer) and "apply" not in vars(optimizer):
        optimizer.apply = wrap(optimizer)


def end(recorder: Any) -> Any:
    """Have it called no longer. Returns the optimizer that did so, if there is one."""
    optimizer = recorder.optimizer()
    if optimizer is None or recorder not in attached(optimizer):
        return None
    attached(optimizer).remove(recorder)
    if not attached(optimizer):
        vars(optimizer).pop("apply", None)
    return optimizer


def updating(optimizer: Any) -> list[Any]:
    """The optimizers that update variables, without those around them.

    Raises:
        ValueError: if these do not accumulate over the same number of steps.
    """
    optimizers = _inside(optimizer)
    times = [one.gradient_accumulation_steps for one in optimizers]
    if len(set(times)) > 1:
        raise ValueError(
            "The optimizers of a `MultiOptimizer` can be logged together if they have the same "
            f"`gradient_accumulation_steps`. Received: {times}"
        )
    return optimizers


def _inside(optimizer: Any) -> list[Any]:
    inside = getattr(optimizer, "inner_optimizer", None)
    if inside is not None:
        return _inside(inside)
    several = getattr(optimizer, "optimizers", None)
    if several is not None:
        return [one for one in several if one.built]
    return [optimizer]


class Given(NamedTuple):
    """What weights are updated with.

    Attributes:
        gradients: one for each of `variables`.
        variables: the weights.
        positions: where they are among all variables of the optimizer.
    """

    gradients: list[Any]
    variables: list[Any]
    positions: list[int]


class Watched:
    """Takes the place of an optimizer's `apply`. A backend supplies `_update`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._apply = optimizer.apply

    def __call__(self, grads: Any, trainable_variables: Any = None) -> None:
        known, gradients = self._optimizer._trainable_variables, list(grads)
        variables = list(known if trainable_variables is None else trainable_variables)
        given = _given(self._optimizer, gradients, variables)
        if given.gradients:
            self._update(given, gradients, variables)
        else:
            self._apply(gradients, variables)

    def _update(self, given: Given, gradients: list[Any], variables: list[Any]) -> None:
        """Record, and apply the gradients to the variables."""
        raise NotImplementedError


def _given(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> Given:
    pairs = [
        (gradient, variable)
        for gradient, variable in zip(gradients, variables, strict=True)
        if gradient is not None and not getattr(variable, "overwrite_with_gradient", False)
    ]
    return Given(
        [gradient for gradient, _ in pairs],
        [variable for _, variable in pairs],
        [optimizer._get_variable_index(variable) for _, variable in pairs],
    )


def measured(
    squares: Tensor,
    prescale: Tensor,
    gradients: Sequence[Tensor],
    positions: Sequence[int],
    count: int,
) -> tuple[Measured, Callable[[], dict[int, Tensor]]]:
    """The norms of a gradient, and a function that divides it by its norm.

    Args:
        squares: sum of squares of each variable's gradient times `prescale`.
        prescale: a power of two.
        gradients: one tensor for each of these variables.
        positions: where they are among all variables of the optimizer.
        count: how many these are.
    """
    normalized = update_rule.normalization(_AS_IT_IS, squares, prescale)
    norms = ops.cast(update_rule.spread(normalized.norms, positions, count), "float32")
    return Measured(ops.cast(normalized.norm, "float32"), norms, None), lambda: dict(
        zip(positions, update_rule.directions(normalized, list(gradients)), strict=True)
    )
