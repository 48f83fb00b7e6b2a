"""Memory bandwidth that all cores together, or the accelerator, reach."""

from collections.abc import Callable
from typing import NamedTuple

import keras

import modes
from timing import fastest_call

FLOATS = 1 << 26
"""Elements of each float32 array: 256 MB, far more than any cache holds."""


class Bandwidth(NamedTuple):
    """The best rate measured, and the name of the candidate that reached it."""

    bytes_per_second: float
    measured_by: str


def measure_bandwidth(calls: int = 10) -> Bandwidth:
    """Measure the memory bandwidth with each candidate of the backend; return the highest.

    Args:
        calls: the number of timed calls of each candidate, of which the fastest counts.
    """
    return max(
        Bandwidth(candidate(calls), name)
        for name, candidate in _CANDIDATES[keras.backend.backend()].items()
    )


def _rate(arrays: int, seconds: float) -> float:
    """Return the bytes per second at which float32 arrays of `FLOATS` elements were moved."""
    return 4 * FLOATS * arrays / seconds


def _xla(calls: int) -> float:
    """Return the bytes per second of `w -= 0.01 * u` in TensorFlow, compiled by XLA."""
    import tensorflow as tf

    w, u = (tf.Variable(tf.ones(FLOATS)) for _ in range(2))

    @tf.function(jit_compile=True, autograph=False)
    def step() -> None:
        w.assign_sub(0.01 * u)

    return _rate(3, fastest_call(step, calls))


def _momentum_kernel(calls: int) -> float:
    """Return the bytes per second of TensorFlow's kernel for a step of momentum SGD."""
    import tensorflow as tf

    w, u, g = (tf.Variable(tf.ones(FLOATS)) for _ in range(3))

    @tf.function(autograph=False)
    def step() -> None:
        tf.raw_ops.ResourceApplyMomentum(
            var=w.handle, accum=u.handle, lr=0.01, grad=g.read_value(), momentum=0.9
        )

    return _rate(5, fastest_call(step, calls))


def _jax(calls: int) -> float:
    """Return the bytes per second of `w -= 0.01 * u` in JAX, in the memory of `w`."""
    import jax

    add = jax.jit(lambda w, u: w - 0.01 * u, donate_argnums=0)
    w, u = (jax.numpy.ones(FLOATS) for _ in range(2))

    def step() -> None:
        nonlocal w
        w = add(w, u).block_until_ready()

    return _rate(3, fastest_call(step, calls))


def _torch(calls: int) -> float:
    """Return the bytes per second of `w -= 0.01 * u` in PyTorch, in place."""
    import torch

    from steps_torch import synchronized

    device = torch.device("cuda" if modes.accelerator() else "cpu")
    w, u = (torch.ones(FLOATS, device=device) for _ in range(2))
    return _rate(3, fastest_call(synchronized(lambda: w.add_(u, alpha=-0.01), device), calls))


_CANDIDATES: dict[str, dict[str, Callable[[int], float]]] = {
    "tensorflow": {"TensorFlow, XLA": _xla, "TensorFlow, momentum kernel": _momentum_kernel},
    "jax": {"JAX": _jax},
    "torch": {"PyTorch": _torch},
}
