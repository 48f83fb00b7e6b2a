"""Tests of `suggest_learning_rate` with what only PyTorch has: modules and processes."""

import keras
import numpy as np
import pytest
import torch
from keras.layers import TorchModuleWrapper

from foreign_models import X, Y
from keras_sngm import SNGM, suggest_learning_rate
from processes import SUPPORT, run_python


def test_all_processes_get_the_same_rate():
    """Each process has other data, and so another loss; they compare rates by the mean."""
    printed = run_python(SUPPORT / "torch_suggesting.py").splitlines()
    first, second = printed
    assert first == second


def new_model():
    """Return a compiled model with modules of PyTorch, which have state of their own."""
    modules = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    model = keras.Sequential([keras.Input((6,)), TorchModuleWrapper(modules)])
    model.add(keras.layers.Dropout(0.2))
    model.add(keras.layers.Dense(1))
    model.compile(SNGM(), loss="mse")
    model(X[:2])
    return model


def state_of(model):
    """Return buffers, modes and gradients of all modules."""
    modules = [module for layer in model.layers for module in layer.modules()]
    buffers = [buffer.clone() for module in modules for buffer in module.buffers(recurse=False)]
    weights = [weight for module in modules for weight in module.parameters(recurse=False)]
    return buffers, [module.training for module in modules], [weight.grad for weight in weights]


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.filterwarnings("ignore:Training has:UserWarning")
def test_state_of_modules(is_trained):
    """Batch statistics, modes and gradients are afterwards as they were."""
    model = new_model()
    if is_trained:
        model.fit(X, Y, 8, verbose=0)
    buffers, *others = state_of(model)
    suggest_learning_rate(model, X, Y, 8, 3, verbose=0)
    buffers_now, *others_now = state_of(model)
    assert len(buffers) >= 3
    assert all(map(torch.equal, buffers, buffers_now))
    assert len(others[1]) >= 5
    assert others[0] == others_now[0]
    assert [id(one) for one in others[1]] == [id(one) for one in others_now[1]]


def test_inputs_in_16_bits():
    keras.utils.set_random_seed(0)
    model = new_model()
    x = torch.from_numpy(X).bfloat16()
    arguments = {"batch_size": len(X), "epochs": 100, "verbose": 0}
    found = suggest_learning_rate(model, x, Y, **arguments)
    assert found == suggest_learning_rate(model, np.asarray(x.float()), Y, **arguments)
