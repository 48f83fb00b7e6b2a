"""Sums of squares that cost one pass over the gradient and survive any magnitude."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from keras_sngm import update_rule


def sums_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """One sum per variable."""
    return jnp.stack([jnp.sum(jnp.square(gradient)) for gradient in gradients])


def squares_and_prescale(
    gradients: Sequence[jax.Array], blockwise: bool
) -> tuple[jax.Array, jax.Array]:
    """The gradients' sums of squares, and the factor by which they were multiplied first.

    Args:
        gradients: of any dtypes that are computed with.
        blockwise: whether each sum is used by itself, so that each has to be trusted.

    Returns:
        A vector, and a power of two: 1 unless the squares overflow or are too small to
        trust. With `blockwise` a vector of such powers.
    """
    widest = jnp.result_type(*gradients)
    wide = [gradient.astype(widest) for gradient in gradients]
    squares = sums_of_squares(wide)
    size = sum(gradient.size for gradient in gradients)
    trusted, prescale = update_rule.trust(squares, size, blockwise)

    def rescued() -> jax.Array:
        factors = jnp.broadcast_to(prescale, (len(wide),))
        # XLA makes g^2 * factor^2 of (g * factor)^2 if it knows g, and factor^2 is infinite.
        unknown = jax.lax.optimization_barrier(wide)
        return sums_of_squares([g * factor for g, factor in zip(unknown, factors, strict=True)])

    return jax.lax.cond(trusted, lambda: squares, rescued), prescale


def sum_of_squares(gradients: Sequence[jax.Array]) -> jax.Array:
    """Of all elements of some gradients, float32."""
    return jnp.sum(sums_of_squares([gradient.astype("float32") for gradient in gradients]))
