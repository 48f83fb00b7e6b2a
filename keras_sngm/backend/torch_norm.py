"""Sums of squares that cost one pass over the gradient and survive any magnitude."""

from collections.abc import Sequence

import torch

from keras_sngm import update_rule
from keras_sngm.backend.torch_lists import converted, scaled

# In elements. On CPUs PyTorch adds up squares one after the other, which for long
# tensors gathers rounding errors: 1e-3 of the norm for 20 million elements.
_LONGEST = 2**18


def squares_and_prescale(
    gradients: Sequence[torch.Tensor], blockwise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients' sums of squares, and the factor by which they were multiplied first.

    Args:
        gradients: on one device.
        blockwise: whether each sum is used by itself, so that each has to be trusted.

    Returns:
        A vector, and a power of two: 1 unless the squares overflow or are too small to
        trust. With `blockwise` a vector of such powers.
    """
    if not host_decides(gradients[0]):
        # Without a condition, for which the host would have to wait.
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square()
        return squares, torch.ones_like(squares if blockwise else squares[0])
    doubles = any(gradient.dtype == torch.float64 for gradient in gradients)
    widest = converted(gradients, torch.float64 if doubles else torch.float32)
    squares = _sums_of_squares(widest)
    size = sum(gradient.numel() for gradient in gradients)
    trusted, prescale = update_rule.trust(squares, size, blockwise)
    if not trusted:
        squares = _sums_of_squares(scaled(widest, prescale))
    return squares, prescale


def host_decides(tensor: torch.Tensor) -> bool:
    """Whether the host asks for the norm and all that a step depends on.

    On CPUs that costs nothing. CUDA, which is ROCm's name, too, has no need of it. Others
    may have: kernels for Apple's GPUs ignored `found_inf` and `grad_scale`
    (https://github.com/pytorch/pytorch/pull/186360), and not all have float64.
    """
    return tensor.device.type != "cuda"


def in_range(norm: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether the gradients can be divided by their norm where the host does not decide."""
    if all(gradient.dtype == torch.float64 for gradient in gradients):
        return torch.isfinite(norm)
    return torch.isfinite(norm.float())


def sum_of_squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of all elements of some gradients, float32."""
    squares, prescale = squares_and_prescale(converted(gradients, torch.float32), False)
    return (squares.sum() / prescale / prescale).float()


def _sums_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One sum per tensor."""
    parts: list[torch.Tensor] = []
    lengths = []
    for tensor in tensors:
        pieces = [tensor] if tensor.numel() <= _LONGEST else tensor.reshape(-1).split(_LONGEST)
        parts.extend(pieces)
        lengths.append(len(pieces))
    squares = torch.stack(torch._foreach_norm(parts)).square()
    if len(parts) == len(tensors):
        return squares
    owners = torch.repeat_interleave(torch.arange(len(tensors)), torch.tensor(lengths))
    return squares.new_zeros(len(tensors)).index_add_(0, owners.to(squares.device), squares)
