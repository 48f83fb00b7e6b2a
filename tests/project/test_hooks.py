"""Tests for private names of Keras, TensorFlow and PyTorch on which `keras_sngm.backend` relies.

When one of these names is changed, its test says what no longer works. Other failures would be
harder to read.
"""

import ast
import importlib
import pathlib
import re

import keras
import pytest
import tensorflow as tf
from tensorflow.python.distribute.cross_device_ops import CollectiveAllReduce

from processes import run_python

BACKEND = pathlib.Path(__file__).parents[2] / "keras_sngm" / "backend"

OF_KERAS = {
    "_accumulated_gradients": "Keras cannot accumulate what overwrites a float8 variable.",
    "_check_variables_are_known": "Variables the optimizer was not built with are not refused.",
    "_distribution_strategy": "An optimizer does not know the strategy it was created under.",
    "_filter_empty_gradients": "Variables without a gradient are not left out.",
    "_get_variable_index": "A gradient is not matched with its momentum.",
    "_iterations": "Calls are not counted: accumulation and schedules stand still.",
    "_learning_rate": "The schedule of accumulated micro-batches is not found.",
    "_model_variables_moving_average": "The averages of `use_ema` are not found.",
    "_overwrite_variables_directly_with_gradients": "float8 scales are updated as if weights.",
    "_track_variable": "Accumulated gradients are not saved.",
    "_untrack_variable": "On JAX a recorder stays in the state of the optimizer for ever.",
    "_trainable_variables": "The variables the optimizer was built with are not found.",
}
OF_MODEL = {
    "_compile_loss": "After a suggestion the next `fit` reads its first batch once less.",
    "_compile_metrics": "After a suggestion the next `fit` reads its first batch once less.",
    "_flatten_layers": "A suggestion does not know the layers inside of others.",
    "_symbolic_build": "A suggestion cannot build a model from data.",
    "jax_state_sync": "On JAX a suggestion cannot reset metrics in the middle of an epoch.",
    "steps_per_execution": "A suggestion cannot take steps one by one.",
    "train_function": "A suggestion is trained at the learning rate of the last `fit`.",
}
IMPORTED = {
    ("keras.src.backend.common.global_state", "get_global_attribute"): (
        "A suggestion does not set back Keras' global generator of seeds."
    ),
    ("keras.src.backend.common.global_state", "set_global_attribute"): (
        "A suggestion does not set back Keras' global generator of seeds."
    ),
    ("keras.src.random.seed_generator", "GLOBAL_SEED_GENERATOR"): (
        "A suggestion does not set back Keras' global generator of seeds."
    ),
    ("keras.src.random.seed_generator", "global_seed_generator"): (
        "On TensorFlow a model that draws its first weights from it cannot be built."
    ),
    ("tensorflow.python.ops", "stateful_random_ops"): (
        "A suggestion does not set back TensorFlow's global generator."
    ),
    ("keras.src.backend.common.stateless_scope", "in_stateless_scope"): (
        "On PyTorch `stateless_apply` changes the variables."
    ),
    ("tensorflow.python.distribute.cross_device_ops", "CollectiveAllReduce"): (
        "Replicas on the CPUs of one machine send gradients to each other that all can read."
    ),
    ("tensorflow.python.distribute.distribute_utils", "regroup"): (
        "Accumulated gradients of several replicas cannot be reduced."
    ),
    ("tensorflow.python.distribute.values_util", "get_current_replica_id_as_int"): (
        "A replica under XLA does not find its own part of a variable."
    ),
    ("tensorflow.compiler.tf2xla.python.xla", "optimization_barrier"): (
        "XLA makes NaN of gradients that it knows and that are too small to square."
    ),
    ("tensorflow.python.eager.context", "context"): (
        '`jit_compile="auto"` does not know where operations have callbacks that XLA cannot '
        "compile."
    ),
    ("tensorflow.python.framework.config", "is_op_determinism_enabled"): (
        '`jit_compile="auto"` does not know where XLA is forbidden.'
    ),
    ("tensorflow.python.framework.ops", "get_default_graph"): (
        "A step does not know whether it is inside of XLA."
    ),
    ("tensorflow.python.ops.control_flow_util", "GraphOrParentsInXlaContext"): (
        "Inside of XLA a step calls what XLA cannot compile, and on several devices "
        "`compile(jit_compile=True)` gets no readable error."
    ),
    ("tensorflow.python.ops.control_flow_v2_func_graphs", "CondBranchFuncGraph"): (
        "Under XLA on several GPUs, replicas that decide differently wait for ever."
    ),
}


OF_TORCH = {
    "_foreach_add",
    "_foreach_add_",
    "_foreach_clamp_max",
    "_foreach_clamp_min_",
    "_foreach_copy_",
    "_foreach_div",
    "_foreach_div_",
    "_foreach_lerp_",
    "_foreach_mul",
    "_foreach_mul_",
    "_foreach_norm",
    "_foreach_zero_",
    "_fused_sgd_",
}


def built_optimizer():
    """Return a built SGD of Keras with moving averages and gradient accumulators."""
    optimizer = keras.optimizers.SGD(use_ema=True, gradient_accumulation_steps=2)
    optimizer.build([keras.Variable([0.0])])
    return optimizer


@pytest.mark.parametrize("name, broken", OF_KERAS.items())
def test_keras_still_has(name, broken):
    assert hasattr(built_optimizer(), name), broken


@pytest.mark.parametrize("name, broken", OF_MODEL.items())
def test_a_model_still_has(name, broken):
    from keras.src.backend.jax.trainer import JAXTrainer

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert hasattr(model, name) or hasattr(JAXTrainer, name), broken


def test_the_context_still_has_its_generator_of_seeds():
    from tensorflow.python.eager import context

    tf.random.set_seed(0)
    assert hasattr(context.context(), "_rng"), (
        "A suggestion does not set back the seeds of operations without one."
    )


@pytest.mark.parametrize("module, name, broken", [(*k, v) for k, v in IMPORTED.items()])
def test_its_module_still_has(module, name, broken):
    assert hasattr(importlib.import_module(module), name), broken


def test_a_strategy_still_has_its_reduction():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    assert isinstance(strategy.extended._cross_device_ops, CollectiveAllReduce), (
        "Whether a user chose a reduction is not known: gradients take the slower one."
    )


@pytest.fixture(scope="module")
def names_of_torch():
    """Return the names in the module `torch`, read in another process.

    In a process that has imported TensorFlow, PyTorch can crash.
    """
    return run_python("-c", "import torch; print(*dir(torch))").split()


@pytest.mark.parametrize("name", sorted(OF_TORCH))
def test_torch_still_has(names_of_torch, name):
    assert name in names_of_torch, "Lists of tensors would have to be updated one by one."


def test_a_variable_still_holds_its_value():
    variable = keras.Variable(0.0)
    assert variable._value is variable.value, (
        "Small variables take longer on PyTorch, and errors of a training step on JAX are hidden."
    )


def test_a_tensor_still_knows_its_version():
    version = run_python("-c", "import torch; print(torch.zeros(()).add_(1)._version)")
    assert int(version) == 1, "The host asks the device in every step."


def nodes_of(kind):
    """Return all syntax nodes of a type in the modules of `keras_sngm.backend`."""
    trees = [ast.parse(path.read_text()) for path in BACKEND.rglob("*.py")]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)]


def test_no_hook_of_keras_is_missing_here():
    private = {name for name in dir(built_optimizer()) if re.match("_[a-z]", name)}
    assert {node.attr for node in nodes_of(ast.Attribute)} & private == set(OF_KERAS)


def test_no_private_import_is_missing_here():
    private = [
        n for n in nodes_of(ast.ImportFrom) if n.module.startswith(("keras.src", "tensorflow."))
    ]
    imported = {(node.module, alias.name) for node in private for alias in node.names}
    assert imported == set(IMPORTED)


def test_no_hook_of_torch_is_missing_here():
    attributes = [node for node in nodes_of(ast.Attribute) if isinstance(node.value, ast.Name)]
    used = {n.attr for n in attributes if n.value.id == "torch" and n.attr.startswith("_")}
    assert used == OF_TORCH
