"""One SNGM step on the variables of one device, by PyTorch's kernels for lists of tensors."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from keras_sngm import update_rule
from keras_sngm.backend.torch import sgd_kernel as kernel
from keras_sngm.backend.torch.lists import arithmetic, at_least_float32, in_dtypes
from keras_sngm.backend.torch.norm import host_decides
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Coefficients, Rule


class Slot(NamedTuple):
    """A weight and what the optimizer keeps for it."""

    weight: torch.Tensor
    momentum: torch.Tensor | None
    average: torch.Tensor | None
    decays: bool
    constraint: Callable[[torch.Tensor], torch.Tensor] | None


class StepScalars(NamedTuple):
    """What changes from step to step besides the gradient."""

    learning_rate: torch.Tensor
    first_average: torch.Tensor | None
    """Whether the next moving average is the first. `None` if there are none."""
    overwrites_with_average: bool
    may_step: torch.Tensor | None
    """Whether a step may be taken at all. `None` if it may."""


def final_gradients(
    rule: Rule, slots: Sequence[Slot], gradients: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What is to be normalized.

    Args:
        rule: the hyper-parameters.
        slots: those of the variables that have a gradient.
        gradients: theirs.
    """
    own = in_dtypes(gradients, [arithmetic(slot.weight.dtype) for slot in slots])
    if rule.weight_decay is not None and not rule.decoupled_weight_decay:
        decaying = [k for k, slot in enumerate(slots) if slot.decays]
        if decaying:
            decayed = torch._foreach_add(
                [own[k] for k in decaying],
                at_least_float32([slots[k].weight for k in decaying]),
                alpha=rule.weight_decay,
            )
            for k, gradient in zip(decaying, decayed, strict=True):
                own[k] = gradient
    if rule.clipvalue is not None:
        clipped = list(torch._foreach_clamp_max(own, rule.clipvalue))
        torch._foreach_clamp_min_(clipped, -rule.clipvalue)
        # 0 times infinity is NaN, so that the step is skipped.
        torch._foreach_add_(clipped, own, alpha=0.0)
        own = clipped
    return own


def take(
    rule: Rule,
    slots: Sequence[Slot],
    idle: Sequence[Slot],
    gradients: Sequence[torch.Tensor],
    normalized: Normalization,
    scalars: StepScalars,
) -> None:
    """Update weights, momenta and averages in place.

    Args:
        rule: the hyper-parameters.
        slots: those of the variables that have a gradient.
        idle: those of the others.
        gradients: final ones. Overwritten on CUDA.
        normalized: how to normalize them.
        moment: what else the step depends on.
    """
    if host_decides(gradients[0]) and not normalized.is_taken:
        return
    for dtype in {slot.weight.dtype for slot in [*slots, *idle]}:
        coefficients = _coefficients(rule, scalars, normalized.is_taken, arithmetic(dtype))
        own = [k for k, slot in enumerate(slots) if slot.weight.dtype == dtype]
        _update(
            rule,
            coefficients,
            _some(normalized, own, len(slots)),
            [slots[k] for k in own],
            [slot for slot in idle if slot.weight.dtype == dtype],
            [gradients[k] for k in own],
            scalars.overwrites_with_average,
        )
    for slot in slots:
        if slot.constraint is not None:
            constrained = slot.constraint(slot.weight)
            slot.weight.copy_(torch.where(normalized.is_taken, constrained, slot.weight))


def _coefficients(
    rule: Rule, scalars: StepScalars, is_taken: torch.Tensor, dtype: torch.dtype
) -> Coefficients:
    rate = scalars.learning_rate.to(dtype)
    return update_rule.step_coefficients(rule, rate, scalars.first_average, is_taken)


def _some(normalized: Normalization, places: Sequence[int], count: int) -> Normalization:
    """With the factors of some variables alone, where there is one for each."""
    if not normalized.divisor.ndim or not places or len(places) == count:
        return normalized
    prescale = normalized.prescale
    return normalized._replace(
        prescale=_chosen(prescale, places) if prescale.ndim else prescale,
        divisor=_chosen(normalized.divisor, places),
    )


def _chosen(vector: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Not by indexing with a list, for which the host would wait for the device."""
    values = vector.unbind()
    return torch.stack([values[k] for k in places])


def _update(
    rule: Rule,
    coefficients: Coefficients,
    normalized: Normalization,
    slots: Sequence[Slot],
    idle: Sequence[Slot],
    gradients: Sequence[torch.Tensor],
    overwrites_with_average: bool,
) -> None:
    """All that belongs to variables of one dtype."""
    together = [*slots, *idle]
    stored = [[slot.weight for slot in together]]
    stored.append([slot.momentum for slot in slots if slot.momentum is not None])
    stored.append([slot.average for slot in together if slot.average is not None])
    # What has 16 bits or is not row by row in memory is copied to where it is updated, and
    # back; all else is updated where it is.
    weights, momentums, averages = (at_least_float32(tensors) for tensors in stored)
    if slots:
        if rule.weight_decay is not None and rule.decoupled_weight_decay:
            decaying = [w for w, slot in zip(weights, slots, strict=False) if slot.decays]
            _multiply(decaying, 1.0 - coefficients.learning_rate * rule.weight_decay)
        kernel.update(rule, coefficients, normalized, weights[: len(slots)], momentums, gradients)
    if averages:
        _move(averages, weights, coefficients.ema_momentum)
        if overwrites_with_average:
            for weight, average in zip(weights, averages, strict=True):
                weight.copy_(torch.where(coefficients.is_taken, average, weight))
    for kept, new in zip(stored, (weights, momentums, averages), strict=True):
        copied = [(to, of) for to, of in zip(kept, new, strict=True) if to is not of]
        if copied:
            torch._foreach_copy_([to for to, _ in copied], [of for _, of in copied])


def _move(
    averages: list[torch.Tensor], weights: list[torch.Tensor], momentum: torch.Tensor
) -> None:
    """Exponential moving averages of the weights."""
    if host_decides(momentum):
        torch._foreach_lerp_(averages, weights, 1.0 - momentum.item())
    else:
        torch._foreach_mul_(averages, momentum)
        torch._foreach_add_(averages, torch._foreach_mul(weights, 1.0 - momentum))


def _multiply(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    if tensors:
        torch._foreach_mul_(tensors, factor)
