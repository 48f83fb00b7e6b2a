"""The update by PyTorch's fused kernel for momentum SGD, one call for all variables.

The kernel reads gradient, momentum and weight once and writes the last two. It wants the
normalized gradient. Dividing by the norm is left to it, too: on CPUs, where the host
knows the norm, by its `dampening`, which leaves the gradients as they are; elsewhere by
its `grad_scale`, a tensor on the device, which overwrites them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from keras_sngm.backend.torch_lists import converted, scaled
from keras_sngm.backend.torch_norm import is_on_host
from keras_sngm.update_rule import Coefficients, Normalization, Rule

# Up to here 1 - (1 - 1 / norm) is 1 / norm to far below float32's rounding.
_LARGEST_DIVISOR = 2.0**20


def update(
    rule: Rule,
    by: Coefficients,
    normalized: Normalization,
    weights: Sequence[torch.Tensor],
    momentums: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> None:
    """Take the step in place. Where the host knows that it is skipped, it must not be called.

    Args:
        rule: the hyper-parameters.
        by: what to multiply by.
        normalized: how to normalize.
        weights: of one dtype, float32 or float64.
        momentums: one for each, or none at all.
        gradients: one for each.
    """
    how: dict[str, Any] = {"lr": by.learning_rate, "dampening": 0.0}
    divided = normalized.divisor.ndim > 0 or weights[0].dtype == torch.float64
    if is_on_host(weights[0]):
        divisor, prescale = normalized.divisor, normalized.prescale
        divided = divided or rule.nesterov or divisor.item() > _LARGEST_DIVISOR
        divided = divided or prescale.item() != 1.0
        how["lr"] = by.learning_rate.item()
        if not divided and momentums:
            how["dampening"] = 1.0 - 1.0 / divisor.item()
        elif not divided:
            how["lr"] /= divisor.item()
    else:
        divided = divided or _share_memory(gradients)
        how["found_inf"] = torch.logical_not(by.taken).float()
        if not divided:
            how["grad_scale"] = (normalized.divisor / normalized.prescale).float()
    if divided:
        gradients = _divided(gradients, normalized)
    torch._fused_sgd_(
        weights,
        gradients,
        momentums,
        weight_decay=0.0,
        momentum=rule.momentum if momentums else 0.0,
        nesterov=rule.nesterov and bool(momentums),
        maximize=False,
        is_first_step=False,
        **how,
    )


def _share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one tensor is there twice, as where two weights have the same gradient."""
    places = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    return len(set(places)) < len(places)


def _divided(
    gradients: Sequence[torch.Tensor], normalized: Normalization
) -> Sequence[torch.Tensor]:
    own = gradients[0].dtype
    # On the host a divisor may be out of the range of a float32.
    dtype = normalized.divisor.dtype if is_on_host(gradients[0]) else own
    directions = scaled(converted(gradients, dtype), normalized.prescale.to(dtype))
    divisor = normalized.divisor.to(dtype)
    torch._foreach_div_(directions, list(divisor.unbind()) if divisor.ndim else divisor)
    return converted(directions, own)
