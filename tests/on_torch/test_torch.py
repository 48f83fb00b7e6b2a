"""Tests of what only PyTorch has: its compiler, its accelerators, its distributed training."""

import pickle

import keras
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keras_sngm import SNGM, GradientNormLogger
from keras_sngm.backend.common.host_count import HostCount
from keras_sngm.backend.common.recorded_apply import PLAIN_RULE
from keras_sngm.backend.torch import norm as torch_norm
from keras_sngm.backend.torch import optimizer as torch_optimizer
from keras_sngm.backend.torch import sgd_kernel as torch_kernel
from keras_sngm.backend.torch.recorder import Recorder, segment_sum
from keras_sngm.measurements import histogram
from problems import (
    assert_close,
    compare_with_reference,
    random_arrays,
    random_gradients,
    tensors_of,
    train,
    trained_table,
    values_of,
    variables_of,
)
from processes import SUPPORT, run_python
from torch_paths import take_path_of_cuda

X = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))
AVERAGED = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 7}


@pytest.fixture(params=["CUDA", "others"])
def accelerator(request, monkeypatch):
    """Let steps on CPUs take the code path of CUDA, or of other accelerators.

    The fused kernel is replaced by one that checks its arguments.
    """
    if request.param == "CUDA":
        take_path_of_cuda(monkeypatch)
    monkeypatch.setattr(torch_kernel, "is_on_cpu", lambda tensor: False)
    kernel = torch._fused_sgd_

    def strict(weights, gradients, momentums, **how):
        """Assert what the kernels of accelerators demand, then call the kernel of CPUs."""
        assert len({tensor.dtype for tensor in [*weights, *gradients, *momentums]}) == 1
        for tensors in (gradients, momentums or weights):
            assert [t.stride() for t in tensors] == [w.stride() for w in weights]
        told = {name: how[name] for name in ("lr", "found_inf", "grad_scale") if name in how}
        if request.param == "CUDA":
            for value in told.values():
                assert value.dtype == torch.float32
                assert value.ndim == 0
        else:
            assert list(told) == ["lr"]
            assert isinstance(told["lr"], float)
        kernel(weights, gradients, momentums, **how)

    monkeypatch.setattr(torch, "_fused_sgd_", strict)


def fitted(optimizer, *callbacks, **compile_options):
    """Return a new model after two epochs; its initial weights are the same at every call."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **compile_options)
    model.fit(X, Y, 8, 2, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"clipnorm": 1.5, "weight_decay": 0.5, "decoupled_weight_decay": False},
        {"clipvalue": 0.5, "weight_decay": 0.5},
        {"blockwise": True},
        {"scale": 1e30},
        {"scale": 1e-30},
        {"dtypes": "float64", "rate": 0.125},
    ],
    ids=str,
)
def test_the_step_of_accelerators_agrees_with_the_reference(options):
    compare_with_reference("eager", **options)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("options", [{}, AVERAGED, {**AVERAGED, "weight_decay": 0.1}], ids=str)
def test_accelerators_skip_steps_to_the_bit(options):
    variables = variables_of(random_arrays())
    optimizer = SNGM(0.1, **options)
    first, poisoned = random_gradients(steps=2)
    train(optimizer, variables, [first])
    poisoned[2][1, 1] = np.nan
    kept = [*variables, *optimizer.momentums]
    if optimizer.use_ema:
        kept += optimizer._model_variables_moving_average
    before = values_of(kept)
    train(optimizer, variables, [poisoned])
    for now, then in zip(values_of(kept), before):
        assert now.tobytes() == then.tobytes()
    assert int(optimizer.skipped_steps) == 1


class Waits(TorchDispatchMode):
    """Dispatch mode that counts how often the host reads a scalar or makes a tensor of numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        self.count += function in waits
        return function(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """Dispatch mode that adds up the floats which operations on large tensors read and write.

    Args:
        least_size: number of elements of the least tensor that counts.
    """

    def __init__(self, least_size):
        super().__init__()
        self.floats = 0
        self._least_size = least_size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function._schema.name
        read = self._size([args, kwargs])
        written = self._size([args[0]] if name.endswith("_") else results)
        if "_fused_sgd_" in name:
            weights, gradients, momentums = map(self._size, args[:3])
            written = weights + momentums + gradients * ("grad_scale" in (kwargs or {}))
        elif name.endswith(("zero_", "copy_")):
            read -= written
        if not function.is_view:
            self.floats += read + written
        return results

    def _size(self, values):
        """Return the number of elements of the large tensors among some values."""
        sizes = [v.numel() for v in tree_leaves(values) if isinstance(v, torch.Tensor)]
        return sum(size for size in sizes if size >= self._least_size)


def counted_by(waits, function):
    """Return a function that calls the given one in a `with waits` statement."""

    def counted(*args, **kwargs):
        with waits:
            return function(*args, **kwargs)

    return counted


ON_CUDA = pytest.mark.parametrize("accelerator", ["CUDA"], indirect=True)


@ON_CUDA
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"blockwise": True}], ids=str)
@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("float64", "float32")], ids=str)
@pytest.mark.parametrize("magnitude", [3e38, 1e60, 1e-60, 1e-42])
def test_norms_out_of_range_do_no_harm_on_cuda(magnitude, dtypes, options):
    """A step whose norm is out of range is right, or is skipped and counted."""
    variables = variables_of([np.zeros(4), np.zeros(4)], dtypes)
    wide = torch.full((4,), magnitude, dtype=torch.float64)
    gradients = [wide.to(variable.value.dtype) for variable in variables]
    expected = np.array([gradient.double().numpy() for gradient in gradients])
    norms = np.linalg.norm(expected, axis=1 if "blockwise" in options else None, keepdims=True)
    optimizer = SNGM(0.5, **options)
    optimizer.build(variables)
    optimizer.apply(gradients)
    if int(optimizer.skipped_steps):
        assert norms.max() > 3e38
        expected = np.zeros_like(expected)
    else:
        expected = -0.5 * (1.9 if "nesterov" in options else 1.0) * expected
        expected = np.divide(expected, norms, out=expected, where=norms > 0.0)
    np.testing.assert_allclose(values_of(variables), expected, rtol=1e-3)


@ON_CUDA
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blockwise": True, "clipnorm": 1.5},
        {"weight_decay": 0.1, **AVERAGED},
        {"gradient_accumulation_steps": 2, "noise_scale_batch_size": 4},
        {"clipvalue": 0.5, "loss_scale_factor": 4.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtypes", ["float32", ["float32", "float64", "float16", "float32", "float64"]], ids=str
)
def test_the_host_does_not_wait_for_cuda(options, dtypes):
    variables = variables_of(random_arrays(), dtypes)
    optimizer = SNGM(0.1, **options)
    train(optimizer, variables, random_gradients(steps=2))
    gradients = tensors_of(random_gradients(steps=1)[0], variables)
    with Waits() as waits:
        for _ in range(4):
            optimizer.apply(gradients, variables)
        for _ in range(2):  # The first variable has no gradient.
            optimizer.apply(gradients[1:], variables[1:])
    assert waits.count == 0


@ON_CUDA
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    "options, floats",
    [
        ({}, 7),
        ({"nesterov": True}, 7),
        ({"loss_scale_factor": 8.0}, 7),
        ({"weight_decay": 0.1, "decoupled_weight_decay": False}, 10),
        ({"clipvalue": 0.5}, 14),
        ({"clipnorm": 0.5}, 8),
        ({"blockwise": True}, 8),
        ({"use_ema": True}, 10),
        ({"gradient_accumulation_steps": 2}, 2 * 3 + 8),
        ({"gradient_accumulation_steps": 2, "loss_scale_factor": 8.0}, 2 * 3 + 8),
    ],
    ids=str,
)
def test_a_step_on_cuda_moves_no_more_data_than_its_kernels_need(options, floats):
    """The floats that an update reads and writes per parameter, on CPUs as on CUDA."""
    shape = (200, 100)
    variables = variables_of(random_arrays([shape] * 2))
    optimizer = SNGM(0.1, **options)
    optimizer.build(variables)
    gradients = tensors_of(random_arrays([shape] * 2, seed=1), variables)
    with Traffic(least_size=200 * 100) as traffic:
        for _ in range(options.get("gradient_accumulation_steps", 1)):
            optimizer.apply(gradients, variables)
    assert traffic.floats / (2 * 200 * 100) == floats


if torch.version.cuda:

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"blockwise": True, "clipnorm": 1.5},
            {"weight_decay": 0.1, "decoupled_weight_decay": False, "clipvalue": 0.5},
            {"loss_scale_factor": 4.0, **AVERAGED},
            {"gradient_accumulation_steps": 2, "noise_scale_batch_size": 4},
        ],
        ids=str,
    )
    def test_no_value_of_a_cuda_tensor_is_asked_for(monkeypatch, options):
        """A step on tensors that have a CUDA device, but no values, does not fail."""
        variables = variables_of(random_arrays())
        optimizer = SNGM(0.1, **options)
        optimizer.build(variables)
        # These read addresses of memory and a kernel of CUDA, and are known not to wait.
        monkeypatch.setattr(torch_kernel, "_share_memory", lambda tensors: False)
        monkeypatch.setattr(torch_optimizer, "copied_if_aliased", lambda gradients, _: gradients)
        monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **how: None)
        monkeypatch.setattr(keras.src.backend.torch.core, "DEFAULT_DEVICE", "cuda")
        state = list({id(v): v for v in [*variables, *optimizer.variables]}.values())
        with FakeTensorMode(allow_non_fake_inputs=True):
            for variable in state:
                tensor = torch.empty(variable.shape, dtype=variable.value.dtype, device="cuda")
                variable._value = torch.nn.Parameter(tensor, requires_grad=False)
            optimizer._calls.set(optimizer._iterations, 0)
            for _ in range(2):
                optimizer.apply([torch.empty_like(v.value) for v in variables], variables)


def test_averages_are_updated_in_one_pass():
    """The kernel of momentum SGD makes moving averages of weights, as it does on CUDA."""
    averages, weights = (torch.tensor(array) for array in random_arrays([(7, 5)] * 2))
    expected = 0.8 * averages + 0.2 * weights
    torch_kernel.average([averages], [weights], torch.tensor(0.8))
    torch.testing.assert_close(averages, expected)


@pytest.mark.parametrize("make", [SNGM, lambda: keras.optimizers.SGD(0.05)], ids=["SNGM", "SGD"])
def test_nor_does_it_for_a_logger(monkeypatch, tmp_path, make):
    """The host does not wait for the device to record an update."""
    waits = Waits()
    monkeypatch.setattr(Recorder, "record", counted_by(waits, Recorder.record))
    logger = GradientNormLogger(tmp_path, log_every=2, update_ratio=True, histogram_every=3)
    fitted(make(), logger)
    assert waits.count == 0


@ON_CUDA
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("on_nonfinite", ["warn", "stop"])
@pytest.mark.parametrize("make", [SNGM, lambda: keras.optimizers.SGD(0.05)], ids=["SNGM", "SGD"])
def test_nor_does_it_for_a_logger_between_steps(monkeypatch, make, on_nonfinite):
    """A logger makes the host wait for the device only with Keras' own optimizers.

    The host then waits once, and with `on_nonfinite="stop"` once more in each step.
    """
    totals = []
    for callbacks in ([], [GradientNormLogger(on_nonfinite=on_nonfinite)]):
        waits = Waits()
        with monkeypatch.context() as patch:
            for of, name in ((keras.Sequential, "train_step"), (Recorder, "limit_halt")):
                patch.setattr(of, name, counted_by(waits, getattr(of, name)))
            fitted(make(), *callbacks)
        totals.append(waits.count)
    # With Keras' SGD the host reads the number of the first step. To stop, it must also know in
    # each step whether the gradient is finite.
    expected = 0 if make is SNGM else {"warn": 1, "stop": 1 + 12}[on_nonfinite]
    assert totals[1] - totals[0] == expected


def test_histograms_count_further_than_float32_does():
    """Histograms count more than 2^24 elements.

    Keras' `segment_sum`, which adds ones in float32, cannot.
    """
    size = 2**24 + 2**10
    assert histogram(torch.zeros(size), segment_sum)[2:].tolist() == [size] + [0] * 29


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"use_ema": True}], ids=str)
def test_a_backward_pass_through_weights_that_have_changed_is_noticed(options):
    """PyTorch refuses a backward pass through weights that a step has changed."""
    weight = keras.Variable(np.ones(3))
    loss = torch.square(weight.value).sum()
    optimizer = SNGM(**options)
    optimizer.build([weight])
    optimizer.apply(torch.autograd.grad(loss, [weight.value], retain_graph=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, [weight.value])


def test_gradients_stay_as_they_are_on_cpus():
    """A step on a CPU does not overwrite the gradients that it is given."""
    variables = variables_of(random_arrays())
    gradients = tensors_of(random_gradients(steps=1)[0], variables)
    before = [gradient.clone() for gradient in gradients]
    for options in ({}, {"nesterov": True}, {"momentum": 0.0}, {"clipvalue": 0.1}):
        optimizer = SNGM(0.1, **options)
        optimizer.build(variables)
        optimizer.apply(gradients, variables)
    for gradient, expected in zip(gradients, before):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("size", [2**14, 2**14 + 1, 2**18, 2**18 + 1, 5_000_000])
def test_norms_of_long_tensors_are_precise(size):
    """Norms of long tensors are precise. PyTorch's own is off by 2e-4 if all elements are equal."""
    numbers = np.random.default_rng(0).standard_normal(size).astype("float32")
    for tensor in (torch.from_numpy(numbers), torch.full((size,), 0.7)):
        measured = torch_norm.normalized_by(PLAIN_RULE, [tensor, torch.ones(3)])
        expected = [tensor.double().square().sum().item(), 3.0]
        np.testing.assert_allclose(measured.squares, expected, rtol=2e-5)


LAYOUTS = {
    "row by row": lambda tensor: tensor,
    "column by column": lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
    "channels last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "every second row": lambda tensor: tensor.repeat_interleave(2, dim=0)[::2],
}
OPTIONS = [
    {},
    {"nesterov": True},
    {"gradient_accumulation_steps": 2},
    {"blockwise": True, **AVERAGED},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
]


def trained_in(weight_layout, gradient_layout, options):
    """Return variables and optimizer state after four steps with tensors in these layouts."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn((5, 4, 3, 2, 6), generator=generator)
    variables = [keras.Variable(weight_layout(start)), keras.Variable(np.ones(3))]
    assert variables[0].value.stride() == weight_layout(start).stride()
    optimizer = SNGM(0.1, **options)
    optimizer.build(variables)
    for gradient in gradients:
        optimizer.apply([gradient_layout(gradient), torch.ones(3)])
    return [v.numpy() for v in [*variables, *optimizer.variables]]


def assert_layouts_do_not_matter(weights, gradients, options):
    """Assert that training with tensors in these layouts is like training with contiguous ones."""
    got = trained_in(LAYOUTS[weights], LAYOUTS[gradients], options)
    for value, expected in zip(got, trained_in(LAYOUTS["row by row"], lambda g: g, options)):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


layouts = pytest.mark.parametrize("weights", [name for name in LAYOUTS if name[0] != "e"])


@layouts
@pytest.mark.parametrize("gradients", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_how_tensors_lie_in_memory_does_not_matter(weights, gradients, options):
    assert_layouts_do_not_matter(weights, gradients, options)


@layouts
@pytest.mark.parametrize("gradients", LAYOUTS)
@pytest.mark.usefixtures("accelerator")
def test_nor_does_it_on_accelerators(weights, gradients):
    """The memory layout of tensors does not change a step of accelerators."""
    assert_layouts_do_not_matter(weights, gradients, {})


@pytest.mark.usefixtures("accelerator")
def test_strides_that_mean_nothing_do_not_matter_on_accelerators():
    """Tensors may have any stride in a dimension of size 1."""
    column = torch.arange(1.0, 7.0).reshape(6, 1)
    odd = column.reshape(1, 6).t()
    assert column.stride() != odd.stride()
    tables = []
    for weight, gradient in ((column, column), (column, odd), (odd, column)):
        variable = keras.Variable(weight.clone())
        optimizer = SNGM()
        optimizer.build([variable])
        optimizer.apply([gradient.clone()])
        optimizer.apply([gradient.clone()])
        tables.append(variable.numpy())
    np.testing.assert_array_equal(tables[1], tables[0])
    np.testing.assert_array_equal(tables[2], tables[0])


def test_a_gradient_may_be_one_number_many_times():
    """A gradient may be an expanded tensor, which stores one number for all elements."""
    tables = [trained_table(g) for g in (torch.ones(()).expand(5, 3), torch.ones(5, 3))]
    np.testing.assert_allclose(*tables, rtol=1e-6)


def alike(way):
    """Return two equal gradients, which share all, a part or nothing of their memory."""
    if way == "one tensor":
        return [torch.full((3,), 2.0)] * 2
    if way == "one memory in part":  # Gradients of the parts of a concatenation are like this.
        memory = torch.full((5,), 2.0)
        return [memory[:3], memory[2:]]
    return [torch.full((3,), 2.0) for _ in range(2)]


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("way", ["one tensor", "one memory in part"])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"blockwise": True}], ids=str)
def test_weights_may_share_a_gradient_on_accelerators(options, way):
    results = []
    for gradients in map(alike, (way, "apart")):
        variables = variables_of([np.ones(3), np.ones(3)])
        optimizer = SNGM(0.5, **options)
        optimizer.build(variables)
        optimizer.apply(gradients)
        results.append(np.array(values_of(variables)))
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_the_host_knows_when_a_count_was_assigned():
    """HostCount returns the value of a variable also after others have assigned to it."""
    variable = keras.Variable(3, dtype="int64", trainable=False)
    count = HostCount()
    assert count.of(variable) == 3
    variable.assign(5)
    assert count.of(variable) == 5
    count.set(variable, 7)
    assert count.of(variable) == 7
    replaced = keras.Variable(9, dtype="int64", trainable=False)
    assert count.of(replaced) == 9


def test_sparse_gradients_train_like_dense_ones():
    """Duplicate rows of a sparse gradient are added up before the norm is computed."""
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3)).astype("float32"))
    sparse = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2, 2]]), rows, (5, 3))
    trained = [trained_table(gradient) for gradient in (sparse, sparse.to_dense())]
    np.testing.assert_array_equal(*trained)


@pytest.mark.parametrize(
    "make",
    [
        SNGM,
        lambda: SNGM(gradient_accumulation_steps=2, weight_decay=0.1, **AVERAGED),
        lambda: keras.optimizers.SGD(0.05),
    ],
    ids=["SNGM", "SNGM, options", "SGD"],
)
def test_a_compiled_training_step_trains_the_same(make):
    """A training step compiled by PyTorch trains, and is logged, like one that is not compiled."""
    compiled, plain = fitted(make(), jit_compile=True), fitted(make())
    assert_close(compiled.weights, values_of(plain.weights), 1e-5)
    compiled.fit(X, Y, 8, shuffle=False, verbose=0, callbacks=[GradientNormLogger()])
    plain.fit(X, Y, 8, shuffle=False, verbose=0, callbacks=[GradientNormLogger()])
    for key, values in plain.history.history.items():
        np.testing.assert_allclose(compiled.history.history[key], values, rtol=1e-5)
    assert_close(compiled.weights, values_of(plain.weights), 1e-5)


def test_the_host_is_asked_once():
    """The host reads the number of steps once, and again only after others have assigned to it."""
    optimizer = SNGM(gradient_accumulation_steps=2)
    variables = variables_of(random_arrays())
    optimizer.build(variables)
    asked = []
    of = torch.Tensor.__int__

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__int__", lambda self: asked.append(1) or of(self))
        train(optimizer, variables, random_gradients(steps=6))
        assert len(asked) == 1
        optimizer._iterations.assign(1)
        train(optimizer, variables, random_gradients(steps=1))
        assert len(asked) == 2
    assert int(optimizer.iterations) == 1


def test_two_processes_train_like_one(tmp_path):
    """Two processes with DistributedDataParallel and a custom loop train like one."""
    run_python(SUPPORT / "torch_processes.py", tmp_path / "one", 1)
    run_python(SUPPORT / "torch_processes.py", tmp_path / "two", 2)
    one, two = (pickle.loads((tmp_path / name).read_bytes()) for name in ("one", "two"))
    for value, expected in zip(two, one, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
