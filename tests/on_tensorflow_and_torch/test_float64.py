"""Tests with gradients of any magnitude that float64 can hold, on backends that have float64."""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM
from problems import MODES, modes, train, variables_of

NAMES = modes("eager", "eager-xla", "xla-function")
mode = pytest.mark.parametrize("jit_compile, outer", [MODES[name] for name in NAMES], ids=NAMES)


@mode
@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_float64_variables_get_a_float64_norm(jit_compile, outer, scale):
    variable = keras.Variable(np.zeros(4), dtype="float64")
    train(SNGM(0.5, jit_compile=jit_compile), [variable], [[np.full(4, scale)]], outer)
    np.testing.assert_allclose(variable, np.full(4, -0.25), rtol=1e-14)


@mode
@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e50, 1e-50])
def test_float32_variables_beside_float64_ones(jit_compile, outer, scale):
    """A float64 gradient far outside of float32 leaves a float32 variable sound."""
    variables = variables_of([np.zeros(4), np.zeros(2)], ["float64", "float32"])
    gradients = [[np.full(4, scale), np.zeros(2)]]
    train(SNGM(0.5, jit_compile=jit_compile), variables, gradients, outer)
    np.testing.assert_allclose(variables[0].numpy(), np.full(4, -0.25), rtol=1e-14)
    np.testing.assert_array_equal(variables[1].numpy(), [0.0, 0.0])


@mode
@pytest.mark.parametrize("scale", [1e-50, 1.0, 1e60])
def test_clipping_is_as_precise(jit_compile, outer, scale):
    """`clipnorm` has the precision of float64."""
    variables = variables_of([np.zeros(4), np.zeros(1)], "float64")
    gradients = [[np.full(4, scale), np.full(1, 3 * scale)]]
    train(SNGM(1.0, clipnorm=scale, jit_compile=jit_compile), variables, gradients, outer)
    np.testing.assert_allclose(variables[0].numpy(), np.full(4, -0.5 / np.sqrt(2)), rtol=1e-14)
    np.testing.assert_allclose(variables[1].numpy(), np.full(1, -1 / np.sqrt(2)), rtol=1e-14)
