"""Sums of squares that cost one pass over the gradient and survive any magnitude."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from keras_sngm import normalization
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Rule


def sums_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return one sum per variable."""
    return jnp.stack([jnp.sum(jnp.square(gradient)) for gradient in gradients])


def normalized_by(rule: Rule, gradients: Sequence[jax.Array]) -> Normalization:
    """Measure gradients of any dtypes that are computed with."""
    widest = jnp.result_type(*gradients)
    at_least_float32 = [gradient.astype(widest) for gradient in gradients]

    def rescaled_squares(factors: jax.Array) -> jax.Array:
        # XLA makes g^2 * factor^2 of (g * factor)^2 if it knows both, and factor^2 is infinite.
        unknown = jax.lax.optimization_barrier((at_least_float32, factors))
        return sums_of_squares([g * factor for g, factor in zip(*unknown, strict=True)])

    sizes = [gradient.size for gradient in gradients]
    return normalization.safe_normalization(
        rule, sums_of_squares(at_least_float32), sizes, rescaled_squares, jax.lax.cond
    )


def sum_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return that of all elements of some gradients, float32."""
    return jnp.sum(sums_of_squares([gradient.astype("float32") for gradient in gradients]))
