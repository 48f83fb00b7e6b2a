"""Tests of the step that XLA compiles for accelerators on TensorFlow, compiled for the CPU."""

import numpy as np
import pytest
import tensorflow as tf

from accelerator_cases import MAGNITUDES, OPTIONS, RATE, SHAPES, expected_step, scale_of
from keras_sngm import SNGM
from keras_sngm.backend.tensorflow import step as tensorflow_step
from problems import random_arrays, tensors_of, values_of, variables_of
from reference import norm
from selection import quick_only, whole


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """Let steps on CPUs take the code path of accelerators."""
    monkeypatch.setattr(tensorflow_step, "is_accelerator", lambda device: True)


def compiled_step(optimizer, variables):
    """Return a function of gradients that XLA compiles, in which the optimizer takes a step."""

    @tf.function(jit_compile=True, autograph=False)
    def step(gradients):
        optimizer.apply(gradients, variables)

    return step


@pytest.mark.parametrize("name", quick_only(OPTIONS, ["coupled decay"]))
def test_a_step_has_neither_a_branch_nor_a_loop_and_is_right_at_any_magnitude(name):
    variables = variables_of(random_arrays(SHAPES))
    optimizer = SNGM(RATE, **OPTIONS[name])
    optimizer.build(variables)
    step = compiled_step(optimizer, variables)
    state = [*variables, *optimizer.variables]
    initial = values_of(state)
    given = tensors_of(random_arrays(SHAPES, seed=1), variables)
    program = step.experimental_get_compiler_ir(given)(stage="optimized_hlo")
    assert " conditional(" not in program
    assert " while(" not in program
    for magnitude in MAGNITUDES:
        gradients = random_arrays(SHAPES, seed=1, scale=magnitude)
        for variable, value in zip(state, initial, strict=True):
            variable.assign(value)
        step(tensors_of([scale_of(name) * gradient for gradient in gradients], variables))
        expected = expected_step(name, gradients)
        np.testing.assert_allclose(optimizer.gradient_norm, norm(expected.g), rtol=1e-5)
        norms = [norm([gradient]) for gradient in expected.g]
        np.testing.assert_allclose(optimizer.gradient_norms, norms, rtol=1e-5, atol=1.2e-38)
        for variable, weight in zip(variables, expected.w, strict=True):
            np.testing.assert_allclose(variable, weight, rtol=1e-5, atol=1e-6)
    for fault in (np.inf, np.nan):
        before = values_of(variables)
        gradients[1] = np.array(fault)
        step(tensors_of(gradients, variables))
        for variable, value in zip(variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)
    assert int(optimizer.skipped_steps) == 2


@whole
@pytest.mark.parametrize("magnitude", [0.0, 1e-34, 1e-30, 1e30, 1e35])
def test_constants_are_normalized_as_other_gradients_are(magnitude):
    """XLA, which computes with constants, makes no 0 times infinity of them."""
    variables = variables_of(random_arrays(SHAPES))
    optimizer = SNGM(RATE)
    optimizer.build(variables)
    gradients = [np.full(shape, magnitude, "float32") for shape in SHAPES]
    step = compiled_step(optimizer, variables)
    tf.function(lambda: step(tensors_of(gradients, variables)), jit_compile=True)()
    assert int(optimizer.skipped_steps) == 0
    expected = norm([gradient.astype("float64") for gradient in gradients])
    np.testing.assert_allclose(optimizer.gradient_norm, expected, rtol=1e-5)
