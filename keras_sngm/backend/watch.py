"""Which optimizers of a model are to be recorded, and how those of Keras are measured."""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_sngm import update_rule
from keras_sngm.backend.recorder import Measured
from keras_sngm.update_rule import Tensor

_AS_IT_IS = update_rule.Rule(0.0, False, False, None, True, None, None, None, 0.0)


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


def given(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> tuple[list[Any], list[Any], list[int]]:
    """Those gradients that weights are updated with, their variables and these' positions."""
    pairs = [
        (gradient, variable)
        for gradient, variable in zip(gradients, variables, strict=True)
        if gradient is not None and not getattr(variable, "overwrite_with_gradient", False)
    ]
    return (
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
    norms = ops.scatter(
        ops.convert_to_tensor([[i] for i in positions]),
        ops.cast(normalized.norms, "float32"),
        (count,),
    )
    return Measured(ops.cast(normalized.norm, "float32"), norms, None), lambda: dict(
        zip(positions, update_rule.directions(normalized, list(gradients)), strict=True)
    )
