"""The code path that steps on PyTorch take on CUDA, for tests on CPUs."""

from keras_sngm.backend.torch import norm, optimizer, sgd_kernel, step


def take_path_of_cuda(monkeypatch):
    """Have steps on CPUs decide nothing on the host, as on CUDA."""
    for module in (norm, optimizer, sgd_kernel, step):
        monkeypatch.setattr(module, "host_decides", lambda tensor: False)
