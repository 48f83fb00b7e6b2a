"""Tests of compilation: XLA compiles the step where it should, and only once."""

import gc

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from keras_sngm import SNGM, normalization
from problems import SHAPES, random_arrays, random_gradients, tensors_of, variables_of
from processes import run_python
from selection import whole


def function_names():
    """Return the names of all functions that TensorFlow holds."""
    gc.collect()
    return set(context.context().list_function_names())


def compiled_by_xla(names):
    """Return those of the named functions that XLA compiles."""
    definitions = {name: context.context().get_function_def(name) for name in names}
    return [name for name in names if definitions[name].attr["_XlaMustCompile"].b]


def step(optimizer, variables, seed, shapes=SHAPES):
    """Take an eager step with random gradients."""
    (gradients,) = random_gradients(shapes, steps=1, seed=seed)
    optimizer.apply(tensors_of(gradients, variables), variables)


SMALL = [(3,), (4, 5)]
LARGE = [*SMALL, (600, 600)]
compiled_programs = pytest.mark.parametrize(
    "jit_compile, shapes, expected",
    [
        (True, SMALL, 1),
        (True, LARGE, 1),
        ("auto", SMALL, 0),
        ("auto", LARGE, 1),
        (False, SMALL, 0),
        (False, LARGE, 0),
    ],
)


@compiled_programs
def test_an_eager_step_is_at_most_one_xla_program(jit_compile, shapes, expected):
    variables = variables_of(random_arrays(shapes))
    before = function_names()
    optimizer = SNGM(jit_compile=jit_compile)
    step(optimizer, variables, 0, shapes)
    made = function_names() - before
    assert len(compiled_by_xla(made)) == expected


@compiled_programs
def test_a_step_in_a_graph_contains_at_most_one_xla_program(jit_compile, shapes, expected):
    variables = variables_of(random_arrays(shapes))
    optimizer = SNGM(jit_compile=jit_compile)
    optimizer.build(variables)
    function = tf.function(lambda gradients: optimizer.apply(gradients, variables))
    graph = function.get_concrete_function(tensors_of(random_arrays(shapes), variables)).graph
    compiled = [
        name
        for name, definition in graph._functions.items()
        if definition.cached_definition.attr["_XlaMustCompile"].b
    ]
    assert len(compiled) == expected


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
def test_later_steps_add_no_trace(monkeypatch, jit_compile, sparse):
    traces = []
    safe_normalization = normalization.safe_normalization
    monkeypatch.setattr(
        normalization,
        "safe_normalization",
        lambda *args: traces.append(args) or safe_normalization(*args),
    )
    variables = variables_of([np.zeros((9, 2))])
    optimizer = SNGM(jit_compile=jit_compile)
    functions = set()
    for i in range(100):
        gradient = tf.ones((9, 2))
        if sparse:
            # The number of rows changes, as it does with a last, smaller batch.
            rows = 1 + i % 9
            gradient = tf.IndexedSlices(tf.ones((rows, 2)), tf.range(rows), (9, 2))
        optimizer.apply([gradient], variables)
        if i == 0:
            functions = function_names()
    assert len(traces) == 1
    assert function_names() == functions


@whole
def test_later_steps_compile_nothing(tmp_path):
    """XLA compiles one module in 100 steps, as in one step.

    XLA writes a file for each module that it compiles.
    """
    program = """
import sys
import tensorflow as tf
from keras_sngm import SNGM
variables = [tf.Variable([1.0, 2.0]), tf.Variable([[3.0]])]
optimizer = SNGM(jit_compile=True)
for step in range(int(sys.argv[1])):
    optimizer.apply([tf.fill([2], 1.0 + step), tf.fill([1, 1], 2.0 * step)], variables)
"""
    modules = []
    for steps in (1, 100):
        folder = tmp_path / str(steps)
        run_python("-c", program, steps, XLA_FLAGS=f"--xla_dump_to={folder} --xla_dump_hlo_as_text")
        modules.append(len(list(folder.glob("*before_optimizations.txt"))))
    assert modules == [1, 1]


def test_auto_does_not_compile_under_op_determinism():
    run_python(
        "-c",
        """
import tensorflow as tf
from tensorflow.python.eager import context
from keras_sngm import SNGM
tf.config.experimental.enable_op_determinism()
tf.keras.utils.set_random_seed(0)
variable = tf.Variable(tf.ones([600, 600]))
SNGM().apply([variable], [variable])
names = context.context().list_function_names()
assert names
assert not any(
    context.context().get_function_def(name).attr["_XlaMustCompile"].b for name in names
)
""",
    )


def test_auto_does_not_compile_on_macos_gpus(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [f"{kind}:0"])
    before = function_names()
    step(SNGM(), variables_of(random_arrays(LARGE)), 0, LARGE)
    assert not compiled_by_xla(function_names() - before)


def test_auto_does_not_compile_over_several_devices():
    """Variables on two devices train, as with an embedding on the CPU and layers on the GPU."""
    run_python(
        "-c",
        """
import numpy as np
import tensorflow as tf
from keras_sngm import SNGM
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
for size in (1, 360_000):
    variables = []
    for device in ("CPU:0", "CPU:1"):
        with tf.device(device):
            variables.append(tf.Variable(tf.zeros(size)))
    assert variables[0].device != variables[1].device
    SNGM(size**0.5).apply([tf.fill([size], 3.0), tf.fill([size], 4.0)], variables)
    for variable, expected in zip(variables, (-0.6, -0.8)):
        np.testing.assert_allclose(variable, np.full(size, expected), rtol=1e-5)
""",
    )


def test_hyper_parameters_can_be_changed_between_eager_steps():
    variable = tf.Variable([0.0])
    optimizer = SNGM(1.0, momentum=0.5)
    optimizer.apply([tf.ones(1)], [variable])
    optimizer.momentum = 0.25
    optimizer.apply([tf.ones(1)], [variable])
    np.testing.assert_allclose(variable, [-1.0 - 1.25])
