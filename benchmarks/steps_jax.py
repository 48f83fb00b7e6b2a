"""Optimizer steps that JAX compiles."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy as np

from contestants import Step

Update = Callable[[Any, Any, Any], tuple[Any, Any]]
"""Function of weights, state and gradients that returns the new weights and the new state."""


def compiled_step(update: Update, weights: Any, state: Any, gradients: Any) -> Step:
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
    transformation = sngm_of_optax()
    weights = [jax.numpy.ones(g.shape) for g in gradients]
    return compiled_step(
        optax_update(transformation),
        weights,
        transformation.init(weights),
        [jax.numpy.array(g) for g in gradients],
    )


def sngm_of_optax() -> Any:
    """Return SNGM put together from transformations of Optax."""
    import optax  # Steps of Keras' optimizers can be timed where Optax is not installed.

    return optax.chain(
        optax.normalize_by_update_norm(),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.01),
    )


def optax_update(transformation: Any) -> Update:
    """Return the update of a transformation of Optax."""
    import optax

    def update(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    return update


def keras_update(optimizer: keras.optimizers.Optimizer) -> Update:
    """Return the update of a Keras optimizer that is built."""
    return lambda weights, state, gradients: optimizer.stateless_apply(state, gradients, weights)
