"""Updates by PyTorch's fused kernel for momentum SGD, one call for all variables.

The kernel reads gradient, momentum and weight once and writes the last two. It wants the
normalized gradient. Dividing by the norm is left to it, too: on CPUs, where the host
knows the norm, by its `dampening`, which leaves the gradients as they are; on CUDA by
its `grad_scale`, a tensor on the device, which overwrites them. On other devices, where
it heeds no tensors and computes in float32, they are divided before.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from keras_sngm.backend.torch.lists import converted, operand, scaled
from keras_sngm.backend.torch.norm import host_decides
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Coefficients, Rule, nonzero

# The range of divisors in which 1 - (1 - 1 / divisor), computed in float64, is 1 / divisor up
# to less than float32's rounding, and 1 / divisor is a float32.
_LARGEST_DIVISOR = 2.0**20
_LEAST_DIVISOR = 2.0**-100

# The kernel takes no momenta if the coefficient is 0. This one makes them vanish, too.
_NO_MOMENTUM = 2.0**-1000


def update(
    rule: Rule,
    coefficients: Coefficients,
    normalized: Normalization,
    weights: Sequence[torch.Tensor],
    momentums: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> None:
    """Update weights and momenta in place.

    Where the host knows that a step is skipped, this must not be called.

    Args:
        rule: the hyper-parameters.
        coefficients: the factors of this step, in the dtype of the weights.
        normalized: how to normalize the gradients.
        weights: tensors of one dtype, float32 or float64.
        momentums: one for each weight, or none at all.
        gradients: one for each weight.
    """
    if not host_decides(weights[0]):
        gradients, how = _kernel_inputs_on_cuda(coefficients, normalized, gradients)
    elif is_on_cpu(weights[0]):
        gradients, how = _kernel_inputs_on_cpu(
            rule, coefficients, normalized, gradients, bool(momentums)
        )
    else:
        gradients, how = _divided(gradients, normalized), {"lr": coefficients.learning_rate.item()}
    if not is_on_cpu(weights[0]):
        gradients, momentums = _aligned(gradients, weights), _aligned(momentums, weights)
    torch._fused_sgd_(
        weights,
        gradients,
        momentums,
        weight_decay=0.0,
        momentum=(rule.momentum or _NO_MOMENTUM) if momentums else 0.0,
        nesterov=rule.nesterov and bool(momentums),
        maximize=False,
        is_first_step=False,
        **{"dampening": 0.0, **how},
    )
    # Autograd must notice a backward pass through weights that have changed, but the kernel
    # does not tell it.
    for weight in weights:
        torch.autograd.graph.increment_version(weight)


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a CPU: PyTorch's kernel there takes numbers of the host."""
    return tensor.device.type == "cpu"


def _kernel_inputs_on_cpu(
    rule: Rule,
    coefficients: Coefficients,
    normalized: Normalization,
    gradients: Sequence[torch.Tensor],
    has_momentum: bool,
) -> tuple[Sequence[torch.Tensor], dict[str, Any]]:
    """Prepare a call of `torch._fused_sgd_` on a CPU, where it takes numbers of the host.

    With momentum it multiplies gradients by 1 - dampening, which is set to 1 / norm; without,
    the learning rate is divided by the norm.

    Args:
        rule: the hyper-parameters.
        coefficients: the factors of this step.
        normalized: how to normalize the gradients.
        gradients: tensors of one dtype.
        has_momentum: whether momenta are passed to the kernel.

    Returns:
        The gradients to pass to the kernel, and keyword arguments by which it divides them
        by their norm; or gradients that are divided already.
    """
    rate = coefficients.learning_rate.item()
    divided = normalized.divisor.ndim > 0 or gradients[0].dtype == torch.float64 or rule.nesterov
    if divided or normalized.prescale.item() != 1.0:
        return _divided(gradients, normalized), {"lr": rate}
    divisor = normalized.divisor.item()
    if not _LEAST_DIVISOR <= divisor <= _LARGEST_DIVISOR:
        return _divided(gradients, normalized), {"lr": rate}
    if has_momentum:
        return gradients, {"lr": rate, "dampening": 1.0 - 1.0 / divisor}
    return gradients, {"lr": rate / divisor}


def _kernel_inputs_on_cuda(
    coefficients: Coefficients, normalized: Normalization, gradients: Sequence[torch.Tensor]
) -> tuple[Sequence[torch.Tensor], dict[str, Any]]:
    """Prepare a call of `torch._fused_sgd_` on CUDA, where it takes float32 tensors of the device.

    It divides gradients by `grad_scale`, in place, so those that share memory would be divided
    twice.

    Args:
        coefficients: the factors of this step.
        normalized: how to normalize the gradients.
        gradients: tensors of one dtype.

    Returns:
        The gradients to pass to the kernel, and keyword arguments by which it divides them
        by their norm and skips the step if need be; or gradients that are divided already.
    """
    how = {
        "lr": coefficients.learning_rate.float(),
        "found_inf": torch.logical_not(coefficients.is_taken).float(),
    }
    divided = normalized.divisor.ndim > 0 or gradients[0].dtype == torch.float64
    if divided or _share_memory(gradients):
        return _divided(gradients, normalized), how
    # Where the norm is too small for a float32, so are all elements of the gradient.
    how["grad_scale"] = nonzero((normalized.divisor / normalized.prescale).float())
    return gradients, how


def _aligned(
    tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return tensors that share the memory of the given ones and have the weights' strides.

    All are contiguous, but strides of dimensions of size 1 may differ, which PyTorch 2.4
    refuses (https://github.com/pytorch/pytorch/pull/134546).
    """
    return [
        tensor
        if tensor.stride() == weight.stride()
        else tensor.as_strided(weight.size(), weight.stride())
        for tensor, weight in zip(tensors, weights, strict=False)
    ]


def _share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether any two tensors overlap in memory, as gradients of added weights do."""
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    return any(end > begin for (_, end), (begin, _) in itertools.pairwise(places))


def average(
    averages: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], momentum: torch.Tensor
) -> None:
    """Update exponential moving averages of weights in place, in one pass, as CUDA needs it.

    The kernel subtracts `lr * (gradient + weight_decay * parameter)` from each parameter. With the
    weight for the gradient and the average for the parameter, and with `weight_decay=-1`, that
    is `average + (1 - momentum) * (weight - average)`.

    Args:
        averages: tensors of one dtype, float32 or float64.
        weights: one for each average.
        momentum: scalar, the weight of the past.
    """
    torch._fused_sgd_(
        averages,
        _aligned(weights, averages),
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=(momentum - 1.0).float(),
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _divided(
    gradients: Sequence[torch.Tensor], normalized: Normalization
) -> Sequence[torch.Tensor]:
    """Divide gradients by their norm: gradient * prescale / divisor. Returns new tensors.

    Args:
        gradients: tensors of one dtype.
        normalized: factors for all of them together, or vectors with one factor for each.
    """
    given_dtype = gradients[0].dtype
    prescale, divisor = normalized.prescale, normalized.divisor
    if not host_decides(gradients[0]):
        # Where a norm is too small for the dtype, so are all elements of the gradient.
        divisors = nonzero((divisor / prescale).to(given_dtype))
        return list(torch._foreach_div(gradients, operand(divisors)))
    # A divisor may be out of the range of a float32, so its dtype is computed in.
    directions = scaled(converted(gradients, divisor.dtype), prescale)
    torch._foreach_div_(directions, operand(nonzero(divisor)))
    return converted(directions, given_dtype)
