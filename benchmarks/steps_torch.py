"""Optimizer steps of PyTorch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from contestants import Step


def synchronized(step: Callable[[], object], device: torch.device) -> Step:
    """Return a step that waits until the device has finished."""
    if device.type != "cuda":
        return step

    def finished_step() -> None:
        step()
        torch.cuda.synchronize()

    return finished_step


def clipped_sgd(gradients: Sequence[np.ndarray], device: torch.device) -> Step:
    """Return a step that clips by the global norm, then takes a fused step of momentum SGD."""
    weights = [torch.ones(g.shape, requires_grad=True, device=device) for g in gradients]
    for w, g in zip(weights, gradients, strict=True):
        w.grad = torch.tensor(g, device=device)  # Clipping writes to this copy.
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return synchronized(step, device)
