"""What PyTorch's kernels for lists of tensors leave to do by hand."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_sngm.update_rule import arithmetic_dtype


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Duplicate rows of a sparse gradient must be added before a norm is taken, not in 16 bits."""
    if gradient.layout == torch.strided:
        return gradient
    return gradient.to(arithmetic(gradient.dtype)).to_dense()


def apart_from(
    gradients: list[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradients, copied where they are views of weights, which a step changes in place."""
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
    """What the variables hold. Keras takes longer to say that than to update a small one."""
    if in_stateless_scope():
        return [None if v is None else v.value for v in variables]
    return [None if v is None else v.value if v._value is None else v._value for v in variables]


@functools.cache
def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """That in which tensors of the given one are computed with."""
    return getattr(torch, arithmetic_dtype(str(dtype).removeprefix("torch.")))


def converted(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors in one dtype and row by row in memory; those that are so are not copied.

    PyTorch's fused kernels take it for granted that tensors lie in memory alike.
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
    """Each tensor in its dtype."""
    new = list(tensors)
    for dtype in set(dtypes):
        places = [k for k, wanted in enumerate(dtypes) if wanted == dtype]
        for k, tensor in zip(places, converted([tensors[k] for k in places], dtype), strict=True):
            new[k] = tensor
    return new


def at_least_float32(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each in the precision that it is computed with."""
    return in_dtypes(tensors, [arithmetic(tensor.dtype) for tensor in tensors])


def scaled(tensors: Sequence[torch.Tensor], factors: torch.Tensor) -> list[torch.Tensor]:
    """New tensors, the given ones times one factor or times one factor each."""
    if factors.ndim:
        return list(torch._foreach_mul(tensors, list(factors.unbind())))
    return list(torch._foreach_mul(tensors, factors))
