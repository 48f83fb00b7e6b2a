"""Modes, the ways in which a program may take a step, on the backend in use."""

import importlib
from collections.abc import Sequence

import keras

from contestants import Step, backend_of, contestants_not_installed
from shapes import Shape
from timing import Sampler

_backend_modes = importlib.import_module(f"modes_{keras.backend.backend()}")

CONTESTANTS: dict[str, tuple[str, ...]] = _backend_modes.CONTESTANTS
"""Names of the contestants of each mode, steps of other libraries included."""
OPTIMIZERS_WITH_COSTS: tuple[str, ...] = _backend_modes.OPTIMIZERS_WITH_COSTS
"""Names of the optimizers whose first step is measured."""


def samplers(
    mode: str, shapes: Sequence[Shape], names: Sequence[str] | None = None
) -> dict[str, Sampler]:
    """Return a sampler for each contestant of a mode, all on the same gradients.

    Args:
        mode: a key of `CONTESTANTS`.
        shapes: the shapes of the weights.
        names: the contestants, whose steps this backend must be able to take; `None` for all
            whose steps it can take.
    """
    if names is None:
        here = keras.backend.backend()
        names = [name for name, backend in contestants(mode).items() if backend == here]
    gradients = _backend_modes.gradients(mode, shapes)
    return {name: _backend_modes.sampler(mode, name, gradients) for name in names}


def contestants(mode: str) -> dict[str, str]:
    """Return the installed contestants of a mode, each with the backend that takes its steps."""
    return {
        name: backend_of(name)
        for name in CONTESTANTS[mode]
        if name not in contestants_not_installed()
    }


def function_step(name: str, shapes: Sequence[Shape]) -> Step:
    """Return a step of a built optimizer, run as Keras' training function runs it.

    Args:
        name: a Keras optimizer, one of the contestants or of `COSTS_OF`.
        shapes: the shapes of the weights.
    """
    return _backend_modes.function_step(name, _backend_modes.gradients("function", shapes))


def accelerator() -> str | None:
    """Return the name of the accelerator that steps run on, or `None` for CPUs."""
    return _backend_modes.accelerator()
