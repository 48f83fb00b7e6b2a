"""Trainings of a model on PyTorch that leave no trace."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from keras_sngm.backend.common import trials


def _tensor(variable: Any) -> torch.Tensor:
    """Return the tensor of a Keras variable, or a tensor as it is."""
    return variable.value if isinstance(variable, keras.Variable) else variable


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

    def _saved(self, variable: Any) -> Any:
        """Return a copy of the tensor of a variable, or of a tensor, in the memory of the host."""
        return _tensor(variable).detach().cpu().clone()

    def _load(self, variable: Any, value: Any) -> None:
        """Copy what `_saved` has returned into the tensor of a variable, or into a tensor."""
        with torch.no_grad():
            _tensor(variable).copy_(value)

    def _native_state(self, held: Sequence[Any]) -> list[Any]:
        """Return the buffers of PyTorch modules in the model, such as their batch statistics.

        Args:
            held: not used: modules list their buffers.
        """
        return [buffer for module in self._modules() for buffer in module.buffers(recurse=False)]

    def _modules(self) -> list[torch.nn.Module]:
        """Return all modules inside of the model, which Keras does not register in each other."""
        found = [module for layer in (self._model, *self.layers()) for module in layer.modules()]
        return list(dict.fromkeys(found))

    def _save_modes(self) -> None:
        """Have all modules set back to training or evaluation, and gradients to what they were."""
        modes = [(module, module.training) for module in self._modules()]
        weights = {
            weight for module in self._modules() for weight in module.parameters(recurse=False)
        }
        gradients = [(weight, weight.grad) for weight in weights]

        def set_back() -> None:
            """Set the modes and the gradients."""
            for module, mode in modes:
                module.training = mode
            for weight, gradient in gradients:
                weight.grad = gradient

        # New gradients are not to be written over the old ones.
        for weight, _ in gradients:
            weight.grad = None
        self._undo.callback(set_back)

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
