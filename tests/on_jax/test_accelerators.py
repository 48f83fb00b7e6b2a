"""Tests of the step that accelerators run, without one.

JAX lowers the step for an accelerator, and XLA's compiler for CPUs compiles and runs that program.
"""

import jax
import numpy as np
import pytest
from jax import export

from accelerator_cases import MAGNITUDES, OPTIONS, RATE, SHAPES, expected_step, scale_of
from keras_sngm import SNGM
from problems import random_arrays, variables_of
from reference import norm

PLATFORMS = ("cuda", "rocm", "tpu")


class LoweredStep:
    """Step of a new SNGM, lowered for one platform and compiled for the CPU.

    Args:
        platform: the platform, a name that JAX knows.
        options: arguments of the SNGM.
        gradients: gradients that are constants of the program; `None` if it takes them.
    """

    def __init__(self, platform, options, gradients=None):
        self.start = random_arrays(SHAPES)
        variables = variables_of(self.start)
        optimizer = SNGM(RATE, **options)
        optimizer.build(variables)
        self._names = [variable.name for variable in optimizer.variables]
        self._arguments = [v.value for v in variables], [v.value for v in optimizer.variables]

        def step(weights, state, given):
            given = given if gradients is None else gradients
            return optimizer.stateless_apply(state, given, weights)

        exported = export.export(
            jax.jit(step),
            platforms=[platform],
            disabled_checks=[export.DisabledSafetyCheck.platform()],
        )(*self._arguments, self._arguments[0])
        call = jax.jit(exported.call)
        self._compiled = call.lower(*self._arguments, self._arguments[0]).compile()
        self.program = self._compiled.as_text()

    def __call__(self, gradients):
        """Take a first step; return the new weights, and the new state by name."""
        given = [np.asarray(gradient, "float32") for gradient in gradients]
        weights, state = self._compiled(*self._arguments, given)
        return weights, dict(zip(self._names, state, strict=True))


def assert_norms_are_right(state, gradients):
    """Assert that the state has the norm of some gradients and that of each of them."""
    norms = [norm([gradient]) for gradient in gradients]
    np.testing.assert_allclose(state["gradient_norm"], norm(gradients), rtol=1e-5)
    # Elements below the least normal float32 count as zeros.
    np.testing.assert_allclose(state["gradient_norms"], norms, rtol=1e-5, atol=1.2e-38)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_has_neither_a_branch_nor_a_loop_and_is_right_at_any_magnitude(platform, name):
    step = LoweredStep(platform, OPTIONS[name])
    assert " conditional(" not in step.program
    assert " while(" not in step.program
    for magnitude in MAGNITUDES:
        gradients = random_arrays(SHAPES, seed=1, scale=magnitude)
        weights, state = step([scale_of(name) * gradient for gradient in gradients])
        expected = expected_step(name, gradients)
        assert_norms_are_right(state, expected.g)
        for weight, of_reference in zip(weights, expected.w, strict=True):
            np.testing.assert_allclose(weight, of_reference, rtol=1e-5, atol=1e-6)
    for fault in (np.inf, np.nan):
        gradients[1] = np.array(fault)
        weights, state = step(gradients)
        assert state["skipped_steps"] == 1
        assert not np.isfinite(state["gradient_norm"])
        for weight, expected in zip(weights, step.start, strict=True):
            np.testing.assert_array_equal(weight, expected.astype("float32"))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-34, 1e-30, 1e30, 1e35])
def test_constants_are_normalized_as_other_gradients_are(platform, magnitude):
    """XLA, which computes with constants, makes no 0 times infinity of them."""
    gradients = [np.full(shape, magnitude, "float32") for shape in SHAPES]
    _, state = LoweredStep(platform, {}, gradients)(gradients)
    assert state["skipped_steps"] == 0
    assert_norms_are_right(state, [gradient.astype("float64") for gradient in gradients])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_accumulated_update_is_a_loop_and_no_branch(platform):
    """XLA changes the state of a loop in place, but copies what a branch returns."""
    step = LoweredStep(platform, {"gradient_accumulation_steps": 2})
    assert step.program.count(" while(") == 1
    assert " conditional(" not in step.program
