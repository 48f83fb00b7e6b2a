"""Steps of PyTorch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from contestants import Step


def finished(step: Callable[[], object], device: torch.device) -> Step:
    """A step that returns when the device has taken it."""
    if device.type != "cuda":
        return step

    def finished_step() -> None:
        step()
        torch.cuda.synchronize()

    return finished_step


def clipped_sgd(gradients: Sequence[np.ndarray], device: torch.device) -> Step:
    """Clipping by the global norm, then momentum SGD in one kernel per variable."""
    weights = [torch.ones(g.shape, requires_grad=True, device=device) for g in gradients]
    for w, g in zip(weights, gradients, strict=True):
        w.grad = torch.tensor(g, device=device)  # a copy, for clipping writes to it
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return finished(step, device)
