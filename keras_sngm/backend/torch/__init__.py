"""Steps of SNGM on PyTorch, and their recording."""

from keras_sngm.backend.torch.optimizer import BackendOptimizer
from keras_sngm.backend.torch.watch import attach, detach, is_current

__all__ = ["BackendOptimizer", "attach", "detach", "is_current"]
