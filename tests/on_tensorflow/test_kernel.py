"""Tests of steps in which TensorFlow's kernel updates small variables, and XLA large ones.

The tests lower the limit between the two, so that both work on the same model. Every shape occurs
twice, so that some gradients are stacked.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sngm import SNGM
from keras_sngm.backend.tensorflow import momentum_kernel as tensorflow_kernel
from problems import (
    FAR_FROM_ZERO,
    SHAPES,
    TWICE,
    assert_close,
    assert_follows_the_reference,
    random_gradients,
    tensors_of,
    train,
    values_of,
    variables_of,
)
from reference import ReferenceSNGM
from selection import quick_only, whole

COUPLED = {"weight_decay": 0.05, "decoupled_weight_decay": False}
in_mode = pytest.mark.parametrize("jit_compile", ["auto", False])
in_graph = pytest.mark.parametrize("outer", [None, False], ids=["eager", "function"])


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Lower the size limits of the kernel, so that XLA updates the last two of the shapes in use.

    Where moving averages are kept, XLA updates the third shape, too.
    """
    monkeypatch.setattr(tensorflow_kernel, "_LARGEST", 23)
    monkeypatch.setattr(tensorflow_kernel, "_LARGEST_AVERAGED", 19)
    monkeypatch.setattr(tensorflow_kernel, "_LARGEST_STACKED", 5)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Return a list that grows with each call of TensorFlow's kernel for momentum."""
    calls = []
    kernel = tf.raw_ops.ResourceApplyMomentum
    monkeypatch.setattr(
        tf.raw_ops, "ResourceApplyMomentum", lambda **named: calls.append(named) or kernel(**named)
    )
    return calls


def apply_to_some(optimizer, gradients, variables, positions):
    """Take a step with gradients for the variables at these positions only."""
    some = [variables[i] for i in positions]
    optimizer.apply(tensors_of([gradients[i] for i in positions], some), some)


@in_graph
@pytest.mark.parametrize("jit_compile, expected", [("auto", 6), (False, 10), (True, 0)])
def test_the_kernel_is_called_where_it_is_quicker(kernel_calls, jit_compile, expected, outer):
    variables = variables_of(FAR_FROM_ZERO)
    train(SNGM(jit_compile=jit_compile), variables, random_gradients(TWICE, 3), outer)
    assert len(kernel_calls) == expected


@in_graph
@pytest.mark.parametrize("jit_compile, expected", [("auto", 4), (False, 10), (True, 0)])
def test_fewer_variables_go_to_the_kernel_where_averages_are_kept(
    kernel_calls, jit_compile, expected, outer
):
    optimizer = SNGM(use_ema=True, jit_compile=jit_compile)
    train(optimizer, variables_of(FAR_FROM_ZERO), random_gradients(TWICE, 3), outer)
    assert len(kernel_calls) == expected


@in_graph
@pytest.mark.parametrize("options", [{"clipvalue": 0.3}, COUPLED], ids=str)
def test_the_kernel_is_called_for_all_gradients_that_are_changed(kernel_calls, outer, options):
    train(SNGM(**options), variables_of(FAR_FROM_ZERO), random_gradients(TWICE, 2), outer)
    assert len(kernel_calls) == 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_kernel_is_not_called_where_it_would_be_imprecise(kernel_calls, dtype):
    train(SNGM(), variables_of(FAR_FROM_ZERO, dtype), random_gradients(TWICE, 2))
    assert not kernel_calls


@whole
@in_mode
@in_graph
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"momentum": 0.99},
        {"clipnorm": 1.5},
        {"clipvalue": 0.3},
        {"global_clipnorm": 2.0},
        {"blockwise": True},
        {"blockwise": True, "clipnorm": 1.5},
        {"weight_decay": 0.05},
        {"weight_decay": 0.05, "momentum": 0.0},
        COUPLED,
        {**COUPLED, "clipnorm": 1.5},
    ],
    ids=str,
)
def test_both_ways_agree_with_the_reference(jit_compile, outer, options):
    gradients = random_gradients(TWICE, 12)
    assert_follows_the_reference(FAR_FROM_ZERO, gradients, outer, jit_compile, **options)


@whole
@in_mode
@in_graph
@pytest.mark.parametrize("frequency", [None, 3])
def test_averages_are_the_same_both_ways(jit_compile, outer, frequency):
    """The kernel and XLA update moving averages alike.

    In the fifth step some variables have no gradient, but their averages still move.
    """
    options = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": frequency}
    trained = []
    for compiled in (jit_compile, True):
        variables = variables_of(FAR_FROM_ZERO)
        optimizer = SNGM(0.1, weight_decay=0.05, jit_compile=compiled, **options)
        *first, last = random_gradients(TWICE, 5)
        train(optimizer, variables, first, outer)
        apply_to_some(optimizer, last, variables, [0, 1, 4, 7])
        trained.append((variables, optimizer))
    (variables, optimizer), (expected, compiled) = trained
    assert_close(variables, values_of(expected), 1e-6)
    assert_close(optimizer.momentums, values_of(compiled.momentums), 1e-5)
    for each in trained:
        each[1].finalize_variable_values(each[0])
    assert_close(variables, values_of(expected), 1e-6)


@in_graph
@pytest.mark.parametrize("options", [{"clipvalue": 0.3}, {"clipnorm": 1.5}], ids=str)
def test_small_variables_alone_need_no_xla(kernel_calls, outer, options):
    """The kernel updates all variables if all of them are small."""
    gradients = random_gradients(SHAPES[1:3] * 2, 12)
    options = {**COUPLED, **options}
    assert_follows_the_reference(FAR_FROM_ZERO[1:3] * 2, gradients, outer, **options)
    assert len(kernel_calls) == 4


@in_mode
@in_graph
@pytest.mark.parametrize("scale", quick_only([1e37, 1e30, 1e-30, 1e-35], quick=[1e37, 1e-35]))
@pytest.mark.parametrize("options", [{}, {"clipnorm": 1e3}], ids=str)
def test_gradients_of_any_magnitude_are_normalized(jit_compile, outer, scale, options):
    gradients = random_gradients(TWICE, 3, scale=scale)
    assert_follows_the_reference(FAR_FROM_ZERO, gradients, outer, jit_compile, **options)


@pytest.mark.parametrize("jit_compile", ["auto", True, False])
def test_a_norm_beyond_float32_is_divided_by(jit_compile):
    """No element of the gradient overflows, but its norm of 200 times 3e38 does."""
    variables = variables_of([np.zeros(20_000), np.zeros((2, 3, 4)), np.zeros(20_000)])
    gradients = [[np.full(v.shape, 3e38) for v in variables]]
    optimizer = SNGM(1.0, jit_compile=jit_compile)
    train(optimizer, variables, gradients)
    expected = -1.0 / np.sqrt(40_024)
    for variable in variables:
        np.testing.assert_allclose(variable, np.full(variable.shape, expected), rtol=1e-5)
    assert int(optimizer.skipped_steps) == 0


@whole
@in_mode
@in_graph
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 4, 6])
def test_a_non_finite_gradient_skips_the_step(jit_compile, outer, bad, where):
    variables = variables_of(FAR_FROM_ZERO)
    optimizer = SNGM(0.1, jit_compile=jit_compile)
    first, poisoned, third = random_gradients(TWICE, 3)
    poisoned[where] = np.full_like(poisoned[where], bad)
    train(optimizer, variables, [first], outer)
    before = values_of([*variables, *optimizer.momentums])
    train(optimizer, variables, [poisoned], outer)
    for now, then in zip(values_of([*variables, *optimizer.momentums]), before, strict=True):
        np.testing.assert_array_equal(now, then)
    train(optimizer, variables, [third], outer)

    reference = ReferenceSNGM(FAR_FROM_ZERO)
    for gradient in (first, third):
        reference.step(gradient, 0.1)
    assert_close(variables, reference.w, 1e-5)
    assert int(optimizer.skipped_steps) == 1


@in_mode
@in_graph
def test_momentum_coasts_on_a_zero_gradient(jit_compile, outer):
    gradients = [*random_gradients(TWICE, 1), [np.zeros_like(a) for a in FAR_FROM_ZERO]]
    assert_follows_the_reference(FAR_FROM_ZERO, gradients, outer, jit_compile)


def test_norms_are_in_the_order_of_the_variables():
    variables = variables_of(FAR_FROM_ZERO)
    optimizer = SNGM()
    optimizer.build(variables)
    (gradients,) = random_gradients(TWICE, 1)
    given = [0, 2, 3, 4, 5, 6, 9]
    apply_to_some(optimizer, gradients, variables, given)
    norms = [np.linalg.norm(g) if i in given else 0.0 for i, g in enumerate(gradients)]
    np.testing.assert_allclose(optimizer.gradient_norms, norms, rtol=1e-6)


def test_a_gradient_that_is_its_own_variable():
    """The gradient may be read from the buffer of its variable, to which the kernel writes."""
    variables = variables_of(FAR_FROM_ZERO)
    optimizer = SNGM(0.1)
    optimizer.build(variables)
    step = tf.function(lambda: optimizer.apply([v.value for v in variables], variables))
    reference = ReferenceSNGM(FAR_FROM_ZERO)
    for _ in range(5):
        step()
        reference.step([w.copy() for w in reference.w], 0.1)
    assert_close(variables, reference.w, 1e-5)


def test_constraints_are_applied_after_the_kernel():
    variable = keras.Variable([1.0, 1.0], dtype="float32")
    variable.constraint = keras.constraints.NonNeg()
    optimizer = SNGM(10.0)
    optimizer.apply([tf.constant([1.0, -1.0])], [variable])
    np.testing.assert_allclose(variable, [0.0, 1.0 + 10.0 / 2**0.5], rtol=1e-6)
