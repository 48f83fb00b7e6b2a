"""Gradients as JAX has them: dense or sparse, of a loss that may be scaled."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from keras_sngm.backend.jax.state import at_least_float32


def dense(gradient: Any) -> jax.Array:
    """Return a gradient as a dense array; duplicate rows are added up, not in 16 bits."""
    if isinstance(gradient, sparse.BCOO):
        # The method `astype` would add up duplicate rows first, in 16 bits.
        values = at_least_float32(gradient.data)
        return sparse.BCOO((values, gradient.indices), shape=gradient.shape).todense()
    if isinstance(gradient, sparse.JAXSparse):
        return gradient.todense()
    return jnp.asarray(gradient)


def unscaled(gradient: jax.Array, loss_scale_factor: float | None) -> jax.Array:
    """Divide a gradient by the loss scale, not in 16 bits."""
    if loss_scale_factor is None:
        return gradient
    # In 16 bits a small gradient would become zero.
    return at_least_float32(gradient) / loss_scale_factor
