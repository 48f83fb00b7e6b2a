"""Sums of squares that take one pass over the gradient, for gradients of any magnitude."""

import itertools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from keras_sngm import normalization
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Rule

# The greatest number of elements up to which gradients are copied into one array with others, on
# CPUs. Measured on two cores: the sums then take less time, and so does their compilation.
_LARGEST_STACKED = 4096


def sums_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return a vector with the sum of squares of each gradient."""
    return jnp.stack([jnp.sum(jnp.square(gradient)) for gradient in gradients])


def normalized_by(rule: Rule, gradients: Sequence[jax.Array]) -> Normalization:
    """Compute how to normalize gradients, each at least float32.

    Sums of squares that are out of range are computed once more from rescaled gradients. On a
    CPU that is done in a branch, which is hardly ever taken; elsewhere in the same pass, as a
    branch there makes the host wait, or makes copies of gradients that are computed.

    Args:
        rule: the hyper-parameters.
        gradients: one array per variable; they may have several dtypes.
    """
    widest = jnp.result_type(*gradients)
    at_least_float32 = [gradient.astype(widest) for gradient in gradients]
    return jax.lax.platform_dependent(
        *at_least_float32,
        cpu=lambda *gradients: _normalized_in_branches(rule, gradients),
        default=lambda *gradients: _normalized_in_one_pass(rule, gradients),
    )


def _normalized_in_branches(rule: Rule, gradients: Sequence[jax.Array]) -> Normalization:
    """Compute how to normalize gradients, with a branch for magnitudes out of range.

    Each tensor that goes into a branch makes XLA compile longer, so small ones go in together.
    """
    stacks, order = _stacked(gradients)
    ends = np.cumsum([len(stack) for stack in stacks])

    def rescaled_squares(factors: jax.Array) -> jax.Array:
        """Return the sum of squares of each gradient times its factor."""
        # XLA would turn (g * factor)^2 of constants into g^2 * factor^2, which overflows.
        unknown, factors = jax.lax.optimization_barrier((stacks, factors))
        of_rows = jnp.split(factors[jnp.array(order)], ends[:-1])
        scaled = [stack * rows[:, None] for stack, rows in zip(unknown, of_rows, strict=True)]
        return _squares_of_rows(scaled, order)

    return normalization.safe_normalization(
        rule,
        _squares_of_rows(stacks, order),
        [gradient.size for gradient in gradients],
        rescaled_squares,
        jax.lax.cond,
    )


def _stacked(gradients: Sequence[jax.Array]) -> tuple[list[jax.Array], list[int]]:
    """Stack small gradients of one size, and make each other one a stack of its own.

    Returns:
        Matrices with one gradient per row, and the index of the gradient in each row.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, gradient in enumerate(gradients):
        alike = ("size", gradient.size) if gradient.size <= _LARGEST_STACKED else i
        groups.setdefault(alike, []).append(i)
    stacks = [
        jnp.concatenate([gradients[i].reshape(1, -1) for i in group]) for group in groups.values()
    ]
    return stacks, list(itertools.chain(*groups.values()))


def _squares_of_rows(stacks: Sequence[jax.Array], order: Sequence[int]) -> jax.Array:
    """Return a vector with the sum of squares of each gradient, in the order of the gradients.

    Args:
        stacks: matrices with one gradient per row.
        order: the index of the gradient in each row.
    """
    sums = [jnp.sum(jnp.square(stack), axis=1) for stack in stacks]
    return jnp.concatenate(sums)[jnp.array(np.argsort(order))]


def _normalized_in_one_pass(rule: Rule, gradients: Sequence[jax.Array]) -> Normalization:
    """Compute how to normalize gradients, without a branch."""
    sizes = [gradient.size for gradient in gradients]
    return normalization.normalization_in_one_pass(
        rule, gradients, sizes, sums_of_squares, jax.lax.optimization_barrier
    )


def not_before(
    gradients: list[jax.Array], normalized: Normalization
) -> tuple[list[jax.Array], Normalization]:
    """Return the same, but on accelerators have XLA read the gradients anew after normalization.

    What is computed from them both for the norm and for the update is then computed twice. XLA
    would rather store it, which takes the memory of another gradient and the time to move it.
    On a CPU it stores nothing, and reading anew would.
    """
    return jax.lax.platform_dependent(
        gradients,
        normalized,
        cpu=lambda *values: values,
        default=lambda *values: jax.lax.optimization_barrier(values),
    )


def sum_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of the squares of all elements of some gradients, float32."""
    return jnp.sum(sums_of_squares([gradient.astype("float32") for gradient in gradients]))
