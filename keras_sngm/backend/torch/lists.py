"""Helpers for PyTorch's kernels that take lists of tensors."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_sngm.update_rule import arithmetic_dtype


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient as a dense tensor; duplicate rows are added up, not in 16 bits."""
    if gradient.layout == torch.strided:
        return gradient
    return gradient.to(arithmetic_dtype_of(gradient.dtype)).to_dense()


def copied_if_aliased(
    gradients: list[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return gradients that share no memory with weights, which a step changes in place.

    A gradient that is a view of a weight is copied; all others are returned as they are.
    """
    begins = {weight.data_ptr() for weight in weights}
    bases = [gradient._base for gradient in gradients]
    wholes = gradients
    if bases.count(None) < len(bases):
        wholes = [g if base is None else base for g, base in zip(gradients, bases, strict=True)]
    places = [whole.data_ptr() for whole in wholes]
    if begins.isdisjoint(places):
        return gradients
    return [g.clone() if place in begins else g for g, place in zip(gradients, places, strict=True)]


def values(variables: Sequence[keras.Variable | None]) -> list[Any]:
    """Return the tensors that Keras variables hold, and `None` for `None`.

    Quicker than `variable.value`, which takes longer than updating a small variable.
    """
    if in_stateless_scope():
        return [None if v is None else v.value for v in variables]
    return [None if v is None else v.value if v._value is None else v._value for v in variables]


@functools.cache
def arithmetic_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute with for tensors of `dtype`: float32 also for 16-bit ones."""
    return getattr(torch, arithmetic_dtype(str(dtype).removeprefix("torch.")))


def converted(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return tensors in one dtype and contiguous; those that are so already are not copied.

    PyTorch's fused kernels assume that tensors have the same layout in memory.
    """
    new = [
        t
        if t.dtype == dtype and t.is_contiguous()
        else torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
        for t in tensors
    ]
    changed = [(to, of) for to, of in zip(new, tensors, strict=True) if to is not of]
    if changed:
        torch._foreach_copy_([to for to, _ in changed], [of for _, of in changed])
    return new


def in_dtypes(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """Return each tensor contiguous and in the dtype that is given for it."""
    new = list(tensors)
    for dtype in set(dtypes):
        places = [k for k, wanted in enumerate(dtypes) if wanted == dtype]
        for k, tensor in zip(places, converted([tensors[k] for k in places], dtype), strict=True):
            new[k] = tensor
    return new


def at_least_float32(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return each tensor in the dtype that it is computed with: float32 if it has 16 bits."""
    return in_dtypes(tensors, [arithmetic_dtype_of(tensor.dtype) for tensor in tensors])


def scaled(tensors: Sequence[torch.Tensor], factors: torch.Tensor) -> list[torch.Tensor]:
    """Return new tensors: the given ones times one factor, or times one factor each."""
    return list(torch._foreach_mul(tensors, operand(factors)))


def operand(factors: torch.Tensor) -> list[torch.Tensor] | torch.Tensor:
    """Return the elements of a vector in a list, or a scalar as it is.

    Kernels for lists of tensors take one factor for all tensors, or a list with one for each.
    """
    return list(factors.unbind()) if factors.ndim else factors
