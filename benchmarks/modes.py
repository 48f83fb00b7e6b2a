"""The ways in which a program may take the step of an optimizer, on the backend in use."""

import importlib
from collections.abc import Sequence

import keras

from contestants import Step, missing
from shapes import Shape
from timing import Sampler

_here = importlib.import_module(f"modes_{keras.backend.backend()}")

CONTESTANTS: dict[str, tuple[str, ...]] = _here.CONTESTANTS
COSTS_OF: tuple[str, ...] = _here.COSTS_OF
"""Whose first step is measured."""


def samplers(
    mode: str, shapes: Sequence[Shape], names: Sequence[str] | None = None
) -> dict[str, Sampler]:
    """All contestants of a mode, or those named, on the same gradients."""
    names = [name for name in names or CONTESTANTS[mode] if name not in missing()]
    gradients = _here.gradients(mode, shapes)
    return {name: _here.sampler(mode, name, gradients) for name in names}


def function_step(name: str, shapes: Sequence[Shape]) -> Step:
    """The step of a built optimizer as it is a part of Keras' training function."""
    return _here.function_step(name, _here.gradients("function", shapes))


def accelerator() -> str | None:
    """The name of the device that steps run on, None for CPUs."""
    return _here.accelerator()
