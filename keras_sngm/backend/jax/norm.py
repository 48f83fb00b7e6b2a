"""Sums of squares that take one pass over the gradient, for gradients of any magnitude."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from keras_sngm import normalization
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Rule


def sums_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return a vector with the sum of squares of each gradient."""
    return jnp.stack([jnp.sum(jnp.square(gradient)) for gradient in gradients])


def normalized_by(rule: Rule, gradients: Sequence[jax.Array]) -> Normalization:
    """Compute how to normalize gradients, which may have several dtypes."""
    widest = jnp.result_type(*gradients)
    at_least_float32 = [gradient.astype(widest) for gradient in gradients]

    def rescaled_squares(factors: jax.Array) -> jax.Array:
        # XLA would turn (g * factor)^2 of constants into g^2 * factor^2, which overflows.
        """Return the sum of squares of each gradient times its factor."""
        unknown = jax.lax.optimization_barrier((at_least_float32, factors))
        return sums_of_squares([g * factor for g, factor in zip(*unknown, strict=True)])

    sizes = [gradient.size for gradient in gradients]
    return normalization.safe_normalization(
        rule, sums_of_squares(at_least_float32), sizes, rescaled_squares, jax.lax.cond
    )


def sum_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of the squares of all elements of some gradients, float32."""
    return jnp.sum(sums_of_squares([gradient.astype("float32") for gradient in gradients]))
