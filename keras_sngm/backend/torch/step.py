"""One SNGM step on the variables of one device, by PyTorch's kernels for lists of tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from keras_sngm import update_rule
from keras_sngm.backend.common.slot import Slot
from keras_sngm.backend.torch import sgd_kernel as kernel
from keras_sngm.backend.torch.lists import arithmetic_dtype_of, at_least_float32, in_dtypes
from keras_sngm.backend.torch.norm import host_decides
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Coefficients, Rule


class StepScalars(NamedTuple):
    """Scalars that change from step to step, besides the gradient."""

    learning_rate: torch.Tensor
    first_average: torch.Tensor | None
    """Boolean, whether the moving averages begin with this step. `None` if none are kept."""
    overwrites_with_average: bool
    """Whether weights are overwritten by their averages in this step."""
    may_step: torch.Tensor | None
    """Boolean, whether a step may be taken: recorders can forbid it. `None` if none does."""


def final_gradients(
    rule: Rule, slots: Sequence[Slot], gradients: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the gradients to be normalized, after coupled weight decay and `clipvalue`.

    Args:
        rule: the hyper-parameters.
        slots: the slots of the variables that have a gradient.
        gradients: their gradients.
    """
    final = in_dtypes(gradients, [arithmetic_dtype_of(slot.weight.dtype) for slot in slots])
    if rule.weight_decay is not None and not rule.decoupled_weight_decay:
        decaying = [k for k, slot in enumerate(slots) if slot.decays]
        if decaying:
            decayed = torch._foreach_add(
                [final[k] for k in decaying],
                at_least_float32([slots[k].weight for k in decaying]),
                alpha=rule.weight_decay,
            )
            for k, gradient in zip(decaying, decayed, strict=True):
                final[k] = gradient
    if rule.clipvalue is not None:
        clipped = list(torch._foreach_clamp_max(final, rule.clipvalue))
        torch._foreach_clamp_min_(clipped, -rule.clipvalue)
        # Adding 0 times the gradient turns infinity into NaN, so that the step is skipped.
        torch._foreach_add_(clipped, final, alpha=0.0)
        final = clipped
    return final


def take_step(
    rule: Rule,
    slots: Sequence[Slot],
    idle: Sequence[Slot],
    gradients: Sequence[torch.Tensor],
    normalized: Normalization,
    scalars: StepScalars,
) -> None:
    """Update weights, momenta and averages in place, and apply constraints.

    A skipped step changes nothing. On CPUs it ends at once; on CUDA, where the host does not know,
    it is computed with factors that change nothing.

    Args:
        rule: the hyper-parameters.
        slots: the slots of the variables that have a gradient.
        idle: the slots of variables without a gradient that have a moving average.
        gradients: the gradients to be normalized. Overwritten on CUDA.
        normalized: how to normalize them.
        scalars: learning rate, whether averages begin, and whether they overwrite the weights.
    """
    if host_decides(gradients[0]) and not normalized.is_taken:
        return
    for dtype in {slot.weight.dtype for slot in [*slots, *idle]}:
        coefficients = _coefficients(rule, scalars, normalized.is_taken, arithmetic_dtype_of(dtype))
        members = [k for k, slot in enumerate(slots) if slot.weight.dtype == dtype]
        _update_dtype(
            rule,
            coefficients,
            _select(normalized, members, len(slots)),
            [slots[k] for k in members],
            [slot for slot in idle if slot.weight.dtype == dtype],
            [gradients[k] for k in members],
            scalars.overwrites_with_average,
        )
    for slot in slots:
        if slot.constraint is not None:
            constrained = slot.constraint(slot.weight)
            slot.weight.copy_(torch.where(normalized.is_taken, constrained, slot.weight))


def _coefficients(
    rule: Rule, scalars: StepScalars, is_taken: torch.Tensor, dtype: torch.dtype
) -> Coefficients:
    """Return the factors of this step in `dtype`."""
    rate = scalars.learning_rate.to(dtype)
    return update_rule.step_coefficients(rule, rate, scalars.first_average, is_taken)


def _select(normalized: Normalization, places: Sequence[int], count: int) -> Normalization:
    """Return a normalization with the factors of the variables at these places only.

    As it is if one factor is for all variables, or if no place is given. What was measured stays
    that of all variables.

    Args:
        normalized: a normalization of `count` variables.
        places: the places of the wanted variables among these.
        count: number of variables.
    """
    if not normalized.divisor.ndim or not places or len(places) == count:
        return normalized
    prescale = normalized.prescale
    return normalized._replace(
        prescale=_elements(prescale, places) if prescale.ndim else prescale,
        divisor=_elements(normalized.divisor, places),
    )


def _elements(vector: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Return the elements of a vector at these places, without waiting for the device.

    Indexing with a list would make the host wait.
    """
    values = vector.unbind()
    return torch.stack([values[k] for k in places])


def _update_dtype(
    rule: Rule,
    coefficients: Coefficients,
    normalized: Normalization,
    slots: Sequence[Slot],
    idle: Sequence[Slot],
    gradients: Sequence[torch.Tensor],
    overwrites_with_average: bool,
) -> None:
    """Update weights, momenta and averages of all variables of one dtype.

    Args:
        rule: the hyper-parameters.
        coefficients: the factors of this step, in the dtype to compute with.
        normalized: how to normalize the gradients.
        slots: the slots of the variables that have a gradient.
        idle: the slots of variables without a gradient that have a moving average.
        gradients: the gradients to be normalized.
        overwrites_with_average: whether weights are overwritten by their averages.
    """
    together = [*slots, *idle]
    stored = [[slot.weight for slot in together]]
    stored.append([slot.momentum for slot in slots if slot.momentum is not None])
    stored.append([slot.average for slot in together if slot.average is not None])
    # Tensors of 16 bits, and those that are not contiguous, are copied, updated and copied
    # back; all others are updated in place.
    weights, momentums, averages = (at_least_float32(tensors) for tensors in stored)
    if slots:
        if rule.weight_decay is not None and rule.decoupled_weight_decay:
            decaying = [w for w, slot in zip(weights, slots, strict=False) if slot.decays]
            _multiply_in_place(decaying, 1.0 - coefficients.learning_rate * rule.weight_decay)
        kernel.update(rule, coefficients, normalized, weights[: len(slots)], momentums, gradients)
    if averages:
        _move_averages(averages, weights, coefficients.ema_momentum)
        if overwrites_with_average:
            for weight, average in zip(weights, averages, strict=True):
                weight.copy_(torch.where(coefficients.is_taken, average, weight))
    for kept, new in zip(stored, (weights, momentums, averages), strict=True):
        copied = [(to, of) for to, of in zip(kept, new, strict=True) if to is not of]
        if copied:
            torch._foreach_copy_([to for to, _ in copied], [of for _, of in copied])


def _move_averages(
    averages: list[torch.Tensor], weights: list[torch.Tensor], momentum: torch.Tensor
) -> None:
    """Update exponential moving averages of weights, in place.

    Args:
        averages: tensors of one dtype, float32 or float64.
        weights: one for each average.
        momentum: scalar, the weight of the past.
    """
    if host_decides(averages[0]):
        torch._foreach_lerp_(averages, weights, 1.0 - momentum.item())
    else:
        kernel.average(averages, weights, momentum)


def _multiply_in_place(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors by a factor, in place."""
    if tensors:
        torch._foreach_mul_(tensors, factor)
