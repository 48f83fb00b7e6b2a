"""Random weights and gradients that tests share, and functions that take optimizer steps."""

import keras
import numpy as np

from keras_sngm import SNGM
from reference import ReferenceSNGM

BACKEND = keras.backend.backend()
SHAPES = [(), (3,), (4, 5), (2, 3, 4), (2, 2, 3, 2)]
STEPS = 60
SCHEDULE = keras.optimizers.schedules.PolynomialDecay(0.5, STEPS, 0.0, power=1.1)
# JAX replaces float64 by float32, unless it is configured not to when it starts.
DTYPES = [*(() if BACKEND == "jax" else ("float64",)), "float32", "float16", "bfloat16"]

# Ways to run a step: the `jit_compile` of SNGM, and that of the graph around it. The latter is
# `None` for eager steps.
MODES = {
    "tensorflow": {
        "eager": (False, None),
        "eager-xla": (True, None),
        "function": (False, False),
        "function-xla-step": (True, False),
        "xla-function": ("auto", True),
    },
    "jax": {"eager": ("auto", None), "jit": ("auto", True)},
    "torch": {"eager": ("auto", None)},
}[BACKEND]
QUICK_MODES = ("eager-xla", "function")
"""Modes of the quick run: XLA compiles the step alone, or nothing."""
# Tests with many steps run them in a graph where the backend has one, on TensorFlow without XLA.
IN_GRAPH = {"tensorflow": False, "jax": True, "torch": None}[BACKEND]


def modes(*on_tensorflow):
    """Return the given names of modes on TensorFlow, and all modes on other backends."""
    return list(on_tensorflow if BACKEND == "tensorflow" else MODES)


def random_arrays(shapes=SHAPES, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    return [scale * generator.standard_normal(shape) for shape in shapes]


def random_gradients(shapes=SHAPES, steps=STEPS, seed=1, scale=1.0):
    """Return random gradients, one list of arrays per step."""
    return [random_arrays(shapes, seed + 1000 * step, scale) for step in range(1, steps + 1)]


TWICE = SHAPES * 2
# Relative errors say little about weights near zero, so these weights are far from it.
FAR_FROM_ZERO = [4.0 + array for array in random_arrays(TWICE)]


def variables_of(arrays, dtypes="float32"):
    """Return Keras variables; `dtypes` is one dtype for all of them, or a dtype for each."""
    dtypes = [dtypes] * len(arrays) if isinstance(dtypes, str) else dtypes
    return [
        keras.Variable(array, dtype=dtype, name=f"v{i}")
        for i, (array, dtype) in enumerate(zip(arrays, dtypes, strict=True))
    ]


def tensors_of(arrays, variables):
    """Return the arrays as tensors in the dtypes of the variables."""
    return [
        keras.ops.convert_to_tensor(array, variable.dtype)
        for array, variable in zip(arrays, variables, strict=True)
    ]


def stepping(optimizer, variables, jit_compile=None):
    """Return a function of a list of gradients that takes one step.

    The step is eager if `jit_compile` is `None`. Otherwise it is compiled, on TensorFlow by a
    `tf.function` with this `jit_compile`, on JAX by `jax.jit`.
    """
    optimizer.build(variables)

    def apply(gradients):
        optimizer.apply(gradients, variables)

    if jit_compile is not None:
        apply = {"tensorflow": _in_a_function, "jax": _in_a_jit}[BACKEND](
            optimizer, variables, jit_compile
        )
    return lambda gradients: apply(tensors_of(gradients, variables))


def _in_a_function(optimizer, variables, jit_compile):
    import tensorflow as tf

    return tf.function(
        lambda gradients: optimizer.apply(gradients, variables), jit_compile=jit_compile
    )


def _in_a_jit(optimizer, variables, _):
    import jax

    step = jax.jit(lambda *state: optimizer.stateless_apply(*state))

    def apply(gradients):
        own, weights = ([v.value for v in of] for of in (optimizer.variables, variables))
        weights, own = step(own, gradients, weights)
        for variable, value in zip([*variables, *optimizer.variables], [*weights, *own]):
            variable.assign(value)

    return apply


def train(optimizer, variables, gradients_by_step, jit_compile=None):
    """Take a step with each list of gradients; `jit_compile` is that of `stepping`."""
    step = stepping(optimizer, variables, jit_compile)
    for gradients in gradients_by_step:
        step(gradients)


def assert_close(variables, arrays, tolerance):
    """Assert for each variable that norm(error) <= tolerance * norm(expected array)."""
    for variable, array in zip(variables, arrays, strict=True):
        value = variable.numpy().astype("float64")
        error, size = np.linalg.norm(value - array), np.linalg.norm(array)
        assert error <= tolerance * size, f"{variable.name}: error {error:.2e} of {size:.2e}"


def assert_follows_the_reference(start, gradients, outer, jit_compile="auto", rate=0.1, **options):
    """Assert that SNGM takes the same steps as the reference, and skips none.

    Args:
        start: the weights at first, a list of arrays.
        gradients: the gradients of each step.
        outer: the `jit_compile` of the function around the step, `None` for eager steps.
        jit_compile: the `jit_compile` of SNGM.
        rate: the learning rate.
        **options: keyword arguments of both optimizers.
    """
    variables = variables_of(start)
    optimizer = SNGM(rate, jit_compile=jit_compile, **options)
    reference = ReferenceSNGM(start, **options)
    train(optimizer, variables, gradients, outer)
    for gradient in gradients:
        reference.step(gradient, rate)
    assert_close(variables, reference.w, 1e-5)
    assert_close(optimizer.momentums, reference.u if optimizer.momentum else [], 1e-5)
    np.testing.assert_allclose(optimizer.gradient_norm, reference.gradient_norm, rtol=1e-5)
    assert int(optimizer.skipped_steps) == 0


def compare_with_reference(
    mode, tolerance=1e-5, dtypes="float32", scale=1.0, rate=SCHEDULE, **options
):
    """Take 60 steps with SNGM and the reference, compare them, and return both optimizers."""
    jit_compile, outer = MODES[mode]
    start = random_arrays()
    variables = variables_of(start, dtypes)
    start = [v.numpy().astype("float64") for v in variables]
    gradients = random_gradients(scale=scale)
    optimizer = SNGM(rate, jit_compile=jit_compile, **options)
    reference = ReferenceSNGM(start, **options)

    train(optimizer, variables, gradients, outer)
    for t, gradient in enumerate(gradients):
        reference.step(gradient, float(rate(t)) if callable(rate) else rate)

    assert_close(variables, reference.w, tolerance)
    assert_close(optimizer.momentums, reference.u, tolerance)
    np.testing.assert_allclose(optimizer.gradient_norm, reference.gradient_norm, rtol=1e-3)
    return optimizer, reference


def values_of(variables):
    return [variable.numpy() for variable in variables]


def trained_table(gradient):
    """Return a table of 5 rows after five steps with the same gradient."""
    table = keras.Variable(np.ones((5, 3)), dtype="float32")
    optimizer = SNGM()
    for _ in range(5):
        optimizer.apply([gradient], [table])
    return table.numpy()
