"""Sums of squares that take one pass over the gradient, for gradients of any magnitude."""

import functools
from collections.abc import Callable, Sequence

import torch

from keras_sngm import normalization
from keras_sngm.backend.torch.lists import converted, scaled
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Rule

# Numbers of elements. PyTorch's norm adds up squares in a few sums, which for long tensors
# gathers rounding errors, so these are left to the dot product of BLAS, piece by piece. The
# error for equal elements is 1e-5 of the norm, in place of 2e-4.
_SHORT = 2**14
_PIECE = 2**16


def normalized_by(rule: Rule, gradients: Sequence[torch.Tensor]) -> Normalization:
    """Compute how to normalize gradients of one device, which may have several dtypes.

    Where the host reads the norm, on CPUs, squares out of range are computed once more from
    rescaled gradients. Elsewhere squares are taken in float64.

    Args:
        rule: the hyper-parameters.
        gradients: one tensor per variable.
    """
    if not host_decides(gradients[0]):
        # In float64 no squares overflow, so no condition is needed, for which the host would
        # have to wait.
        of_doubles = normalization.normalization_from_squares(rule, _squares_of_doubles(gradients))
        is_finite = of_doubles.is_finite & _is_in_range(of_doubles, gradients)
        return of_doubles._replace(is_finite=is_finite, is_taken=is_finite)
    doubles = any(gradient.dtype == torch.float64 for gradient in gradients)
    widest = converted(gradients, torch.float64 if doubles else torch.float32)
    squares = _sums_of_squares(widest)
    sizes = tuple(gradient.numel() for gradient in gradients)

    def rescaled_squares(factors: torch.Tensor) -> torch.Tensor:
        """Return the sums of squares, those anew whose gradients have a factor other than 1."""
        places = [k for k, factor in enumerate(factors.tolist()) if factor != 1.0]
        if not places:
            return squares
        some = scaled([widest[k] for k in places], torch.stack([factors[k] for k in places]))
        new = list(squares.unbind())
        for k, square in zip(places, _sums_of_squares(some).unbind(), strict=True):
            new[k] = square
        return torch.stack(new)

    return normalization.safe_normalization(rule, squares, sizes, rescaled_squares, _cond)


def _cond(
    condition: torch.Tensor, usual: Callable[[], Normalization], rare: Callable[[], Normalization]
) -> Normalization:
    """Call one of two functions, as the host decides."""
    return usual() if condition else rare()


def host_decides(tensor: torch.Tensor) -> bool:
    """Return whether the host reads the norm, and decides by it whether and how a step is taken.

    On CPUs that costs nothing. CUDA, which is ROCm's name, too, has no need of it. Others
    may have: kernels for Apple's GPUs ignored `found_inf` and `grad_scale`
    (https://github.com/pytorch/pytorch/pull/186360), and not all have float64.

    Args:
        tensor: a tensor on the device in question.
    """
    return tensor.device.type != "cuda"


def _is_in_range(normalized: Normalization, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return whether gradients can be divided by their norm without the host's help.

    That takes norms and divisors that are finite in the dtype of the gradients.
    """
    doubles = all(gradient.dtype == torch.float64 for gradient in gradients)
    dtype = torch.float64 if doubles else torch.float32
    in_range = torch.isfinite(normalized.unclipped.to(dtype))
    if normalized.divisor.ndim:
        in_range = in_range & torch.isfinite(normalized.divisor.to(dtype)).all()
    return in_range


def sum_of_squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements of some gradients, float32.

    On CUDA it is computed in float64, where no square overflows or underflows; elsewhere in
    float32.
    """
    if not host_decides(gradients[0]):
        return _squares_of_doubles(gradients).sum().float()
    return _sums_of_squares(converted(gradients, torch.float32)).sum()


def _squares_of_doubles(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a float64 vector with the sum of squares of each tensor."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square()


def _sums_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a vector with the sum of squares of each tensor, in their dtype."""
    lengths = tuple(tensor.numel() for tensor in tensors)
    short, long, order = _by_length(lengths, tensors[0].device)
    parts = []
    if short:
        parts.append(torch.stack(torch._foreach_norm([tensors[k] for k in short])).square())
    if long:
        parts.append(torch.stack([_sum_of_long(tensors[k].reshape(-1)) for k in long]))
    return torch.cat(parts).index_select(0, order) if len(parts) > 1 else parts[0]


def _sum_of_long(vector: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares of a vector, added up piece by piece."""
    if vector.numel() <= _PIECE:
        return torch.dot(vector, vector)
    return torch.stack([torch.dot(piece, piece) for piece in vector.split(_PIECE)]).sum()


@functools.lru_cache(maxsize=64)
def _by_length(
    lengths: tuple[int, ...], device: torch.device
) -> tuple[list[int], list[int], torch.Tensor]:
    """Split tensors of these lengths into short and long ones.

    Returns:
        The places of the short ones; those of the long ones; and the index that brings the
        results of both, one after the other, back into the order of the tensors.
    """
    short = [k for k, length in enumerate(lengths) if length <= _SHORT]
    long = [k for k, length in enumerate(lengths) if length > _SHORT]
    together = [*short, *long]
    order = sorted(range(len(together)), key=together.__getitem__)
    return short, long, torch.tensor(order, device=device)
