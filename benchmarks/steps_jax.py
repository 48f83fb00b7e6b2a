"""Optimizer steps that JAX compiles."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from contestants import Step


def compiled_step(
    update: Callable[..., tuple[Any, Any]], weights: Any, state: Any, gradients: Any
) -> Step:
    """Return a step compiled by `jax.jit` that donates weights and state, as training does.

    Args:
        update: function of weights, state and gradients that returns the new weights and the
            new state. JAX writes each result into the memory of the first donated argument
            of the same shape, so the order of arguments and results matters.
        weights: the initial weights.
        state: the initial state of the optimizer.
        gradients: the gradients of every step.
    """
    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal weights, state
        weights, state = jax.block_until_ready(jitted(weights, state, gradients))

    return step


def optax_chain(gradients: Sequence[np.ndarray]) -> Step:
    """Return a step of SNGM put together from transformations of Optax."""
    import optax  # Steps of Keras' optimizers can be timed where Optax is not installed.

    transformation = optax.chain(
        optax.normalize_by_update_norm(),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.01),
    )

    def update(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = [jax.numpy.ones(g.shape) for g in gradients]
    return compiled_step(
        update, weights, transformation.init(weights), [jax.numpy.array(g) for g in gradients]
    )
