"""Steps of SNGM on PyTorch, and their recording."""

from keras_sngm.backend.torch.optimizer import BackendOptimizer
from keras_sngm.backend.torch.trials import BackendTrials
from keras_sngm.backend.torch.watch import Attachment

__all__ = ["Attachment", "BackendOptimizer", "BackendTrials"]
