"""Sums of squares that take one pass over the gradient, for gradients of any magnitude."""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

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

    def rescaled_squares(factors: jax.Array) -> jax.Array:
        """Return the sum of squares of each gradient times its factor."""
        # XLA would turn (g * factor)^2 of constants into g^2 * factor^2, which overflows.
        arrays, factors = jax.lax.optimization_barrier((stacks, factors))
        of_rows = jnp.split(factors[jnp.array(order)], np.cumsum([len(a) for a in arrays])[:-1])
        scaled = [
            array * jnp.reshape(rows, (-1,) + (1,) * (array.ndim - 1))
            for array, rows in zip(arrays, of_rows, strict=True)
        ]
        return _squares_of_rows(scaled, order)

    squares = _squares_of_rows(stacks, order)
    return _safe_normalization(rule, gradients, squares, rescaled_squares, jax.lax.cond)


def _stacked(gradients: Sequence[jax.Array]) -> tuple[list[jax.Array], list[int]]:
    """Stack small gradients of one shape, and make each other one a stack of its own.

    Returns:
        Arrays with one gradient per row, and the index of the gradient in each row.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, gradient in enumerate(gradients):
        alike = gradient.shape if gradient.size <= _LARGEST_STACKED else i
        groups.setdefault(alike, []).append(i)
    stacks = [
        jnp.concatenate([gradients[i].reshape(1, -1) for i in group]) for group in groups.values()
    ]
    return stacks, list(itertools.chain(*groups.values()))


def _squares_of_rows(stacks: Sequence[jax.Array], order: Sequence[int]) -> jax.Array:
    """Return a vector with the sum of squares of each gradient, in the order of the gradients.

    Args:
        stacks: arrays with one gradient per row.
        order: the index of the gradient in each row.
    """
    sums = [jnp.sum(jnp.square(stack), axis=tuple(range(1, stack.ndim))) for stack in stacks]
    places = np.argsort(order)
    return jnp.concatenate(sums)[jnp.array(places)]


def _normalized_in_one_pass(rule: Rule, gradients: Sequence[jax.Array]) -> Normalization:
    """Compute how to normalize gradients without a branch, from three sums of each."""
    dtype = gradients[0].dtype
    # XLA would turn (g * unit)^2 into g^2 * unit^2, which overflows, where it knows the unit or
    # the gradient. So it must know neither the unit nor that the minimum changes nothing.
    units = [*normalization.rescaling_units(dtype.name), jnp.inf]
    up, down, no_limit = jax.lax.optimization_barrier([jnp.full((), u, dtype) for u in units])
    squares, squares_up, squares_down = (
        sums_of_squares(gradients),
        sums_of_squares([jnp.minimum(gradient * up, no_limit) for gradient in gradients]),
        sums_of_squares([jnp.minimum(gradient * down, no_limit) for gradient in gradients]),
    )

    def rescaled_squares(factors: jax.Array) -> jax.Array:
        """Return for each gradient the sum of squares that belongs to its factor."""
        scaled = jnp.where(factors > 1, squares_up, squares_down)
        return jnp.where(factors == 1, squares, scaled)

    return _safe_normalization(rule, gradients, squares, rescaled_squares, _select)


def _safe_normalization(
    rule: Rule,
    gradients: Sequence[jax.Array],
    squares: jax.Array,
    rescaled_squares: Callable[[jax.Array], jax.Array],
    cond: Callable[..., Any],
) -> Normalization:
    """Call `normalization.safe_normalization` with the sizes of the gradients."""
    sizes = [gradient.size for gradient in gradients]
    return normalization.safe_normalization(rule, squares, sizes, rescaled_squares, cond)


def _select(
    condition: jax.Array, usual: Callable[[], Normalization], rare: Callable[[], Normalization]
) -> Normalization:
    """Return what one of two functions returns, as `lax.cond` does, but call both."""
    return jax.tree.map(lambda *both: jnp.where(condition, *both), usual(), rare())


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
