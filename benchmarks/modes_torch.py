"""Modes, the ways in which a program may take a step, on PyTorch.

Benchmarks use it through `modes.py`.
"""

from collections.abc import Sequence

import keras
import torch

from contestants import KERAS, MICRO_BATCHES, Step, accumulating_optimizer, weights
from shapes import Shape
from steps_torch import clipped_sgd, synchronized
from timing import Sampler, timed_sampler

CONTESTANTS: dict[str, tuple[str, ...]] = {
    "function": (*KERAS, "PyTorch"),
    "accumulate": ("SNGM", "SGD"),
}
OPTIMIZERS_WITH_COSTS = ("SNGM", "SGD")


def device() -> torch.device:
    """Return the device on which Keras creates variables."""
    return keras.ops.zeros(()).device


def accelerator() -> str | None:
    """Return the name of the GPU that steps run on, or `None` for CPUs."""
    return torch.cuda.get_device_name() if device().type == "cuda" else None


def gradients(mode: str, shapes: Sequence[Shape]) -> list[torch.Tensor]:
    """Return random gradients for all contestants.

    Some contestants write to the gradients. The changed gradients serve the others as well.
    """
    generator = torch.Generator(device()).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device()) for shape in shapes]


def sampler(mode: str, name: str, gradients: Sequence[torch.Tensor]) -> Sampler:
    """Return a sampler of the time that a contestant takes for a step in a mode."""
    if name == "PyTorch":
        return timed_sampler(clipped_sgd([g.cpu().numpy() for g in gradients], device()))
    if mode == "function":
        return timed_sampler(function_step(name, gradients))
    step = _apply_step(accumulating_optimizer(name), gradients)
    return timed_sampler(lambda: [step() for _ in range(MICRO_BATCHES)], steps=MICRO_BATCHES)


def function_step(name: str, gradients: Sequence[torch.Tensor]) -> Step:
    """Return a step of a Keras optimizer among the contestants."""
    return _apply_step(KERAS[name](), gradients)


def _apply_step(optimizer: keras.optimizers.Optimizer, gradients: Sequence[torch.Tensor]) -> Step:
    """Return a step by the optimizer's `apply`, which waits for the device."""
    variables = weights([g.shape for g in gradients])
    optimizer.build(variables)

    def step() -> None:
        with torch.no_grad():  # Keras' training step does so, too.
            optimizer.apply(gradients, variables)

    return synchronized(step, device())
