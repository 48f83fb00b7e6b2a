"""Steps that JAX compiles."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from contestants import Step


def compiled(
    update: Callable[..., tuple[Any, Any]], weights: Any, state: Any, gradients: Any
) -> Step:
    """Steps that write to the memory of what they replace, as those of training do.

    Args:
        update: makes new weights and a new state of weights, state and gradients. JAX
            writes a result to the first argument of its shape, so their order matters.
    """
    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal weights, state
        weights, state = jax.block_until_ready(jitted(weights, state, gradients))

    return step


def optax_chain(gradients: Sequence[np.ndarray]) -> Step:
    """SNGM, put together from what Optax has."""
    import optax  # steps of Keras' optimizers do without it

    transformation = optax.chain(
        optax.normalize_by_update_norm(),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.01),
    )

    def update(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = [jax.numpy.ones(g.shape) for g in gradients]
    return compiled(
        update, weights, transformation.init(weights), [jax.numpy.array(g) for g in gradients]
    )
