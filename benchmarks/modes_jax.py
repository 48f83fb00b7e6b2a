"""Modes, the ways in which a program may take a step, on JAX.

Benchmarks use it through `modes.py`.
"""

from collections.abc import Callable, Sequence

import jax
import keras
import numpy as np

from contestants import KERAS, MICRO_BATCHES, Step, accumulating_optimizer, weights
from shapes import Shape
from steps_jax import compiled_step, keras_update, optax_chain
from timing import Sampler, timed_sampler

CONTESTANTS: dict[str, tuple[str, ...]] = {
    "function": (*KERAS, "Optax"),
    "eager": ("SNGM", "SGD", "Adam"),
    "accumulate": ("SNGM", "SGD"),
}
OPTIMIZERS_WITH_COSTS = ("SNGM", "SGD")


def accelerator() -> str | None:
    """Return the name of the accelerator that steps run on, or `None` for CPUs."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.device_kind


def gradients(mode: str, shapes: Sequence[Shape]) -> list[jax.Array]:
    """Return random gradients, the same for all contestants and modes."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def sampler(mode: str, name: str, gradients: Sequence[jax.Array]) -> Sampler:
    """Return a sampler of the time that a contestant takes for a step in a mode."""
    if name == "Optax":
        return timed_sampler(optax_chain([np.asarray(g) for g in gradients]))
    return _KERAS[mode](name, gradients)


def function_step(name: str, gradients: Sequence[jax.Array]) -> Step:
    """Return a compiled step of a Keras optimizer among the contestants."""
    return _stateless(KERAS[name](), gradients)


def _stateless(optimizer: keras.optimizers.Optimizer, gradients: Sequence[jax.Array]) -> Step:
    """Return a step that compiles the optimizer's `stateless_apply`."""
    variables = weights([g.shape for g in gradients])
    optimizer.build(variables)
    return compiled_step(
        keras_update(optimizer),
        [v.value for v in variables],
        [v.value for v in optimizer.variables],
        gradients,
    )


def _function(name: str, gradients: Sequence[jax.Array]) -> Sampler:
    """Return a sampler of steps within `jax.jit`."""
    return timed_sampler(function_step(name, gradients))


def _eager(name: str, gradients: Sequence[jax.Array]) -> Sampler:
    """Return a sampler of steps by `optimizer.apply` outside of `jax.jit`."""
    variables = weights([g.shape for g in gradients])
    optimizer = KERAS[name]()
    optimizer.build(variables)

    def step() -> None:
        optimizer.apply(gradients, variables)
        jax.block_until_ready([v.value for v in [*variables, *optimizer.variables]])

    return timed_sampler(step)


def _accumulate(name: str, gradients: Sequence[jax.Array]) -> Sampler:
    """Return a sampler of whole accumulation cycles, in seconds per micro-batch."""
    step = _stateless(accumulating_optimizer(name), gradients)
    return timed_sampler(lambda: [step() for _ in range(MICRO_BATCHES)], steps=MICRO_BATCHES)


_KERAS: dict[str, Callable[[str, Sequence[jax.Array]], Sampler]] = {
    "function": _function,
    "eager": _eager,
    "accumulate": _accumulate,
}
