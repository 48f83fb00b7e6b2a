"""Trainings of a model on PyTorch that leave no trace."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from keras_sngm.backend.common import trials


class BackendTrials(trials.Trials):
    """Context in which a model is trained from the state it has, on PyTorch.

    Args:
        model: a compiled model, built or not.
    """

    def mean_over_processes(self, values: Sequence[float]) -> list[float]:
        """Return each value averaged over the processes of `torch.distributed`, if it is in use."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return list(values)
        is_nccl = torch.distributed.get_backend() == "nccl"
        total = torch.tensor(list(values), dtype=torch.float64, device="cuda" if is_nccl else "cpu")
        torch.distributed.all_reduce(total)
        return (total / torch.distributed.get_world_size()).tolist()

    def _saved(self, variable: keras.Variable) -> Any:
        """Return a copy of a variable's tensor in the memory of the host."""
        return variable.value.detach().cpu().clone()

    def _load(self, variable: keras.Variable, value: Any) -> None:
        """Copy what `_saved` has returned into a variable's tensor."""
        with torch.no_grad():
            variable.value.copy_(value)

    def _random_state(self) -> Callable[[], None]:
        """Return a function that sets PyTorch's random states of the host and of all GPUs."""
        state = torch.get_rng_state()
        of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

        def set_back() -> None:
            """Set the states to what they were."""
            torch.set_rng_state(state)
            if of_gpus:
                torch.cuda.set_rng_state_all(of_gpus)

        return set_back
