"""The ways in which a program may take the step of an optimizer, on the backend in use."""

import importlib
from collections.abc import Sequence

import keras

from contestants import Step, backend_of, missing
from shapes import Shape
from timing import Sampler

_here = importlib.import_module(f"modes_{keras.backend.backend()}")

CONTESTANTS: dict[str, tuple[str, ...]] = _here.CONTESTANTS
"""By mode, those of other libraries included."""
COSTS_OF: tuple[str, ...] = _here.COSTS_OF
"""Whose first step is measured."""


def samplers(
    mode: str, shapes: Sequence[Shape], names: Sequence[str] | None = None
) -> dict[str, Sampler]:
    """Return a sampler for each contestant of a mode, all on the same gradients.

    Args:
        mode: a key of `CONTESTANTS`.
        shapes: of the weights.
        names: of contestants whose steps this backend can take; `None` for all of these.
    """
    if names is None:
        here = keras.backend.backend()
        names = [name for name, backend in contestants(mode).items() if backend == here]
    gradients = _here.gradients(mode, shapes)
    return {name: _here.sampler(mode, name, gradients) for name in names}


def contestants(mode: str) -> dict[str, str]:
    """Return the installed contestants of a mode, each with the backend that takes its steps."""
    return {name: backend_of(name) for name in CONTESTANTS[mode] if name not in missing()}


def function_step(name: str, shapes: Sequence[Shape]) -> Step:
    """The step of a built optimizer as it is a part of Keras' training function."""
    return _here.function_step(name, _here.gradients("function", shapes))


def accelerator() -> str | None:
    """The name of the device that steps run on, None for CPUs."""
    return _here.accelerator()
