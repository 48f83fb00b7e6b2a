"""Tests with gradients of any magnitude in float32, and with gradients that are not finite."""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM
from problems import (
    MODES,
    SHAPES,
    assert_close,
    assert_follows_the_reference,
    modes,
    random_arrays,
    random_gradients,
    stepping,
    train,
    values_of,
    variables_of,
)
from reference import ReferenceSNGM
from selection import quick_only, whole

NAMES = modes("eager", "eager-xla", "xla-function")
mode = pytest.mark.parametrize(
    "jit_compile, outer",
    quick_only([MODES[name] for name in NAMES], [MODES[name] for name in NAMES[:1]]),
    ids=NAMES,
)


def state_of(optimizer, variables):
    """Return the values of weights, momentums and moving averages."""
    averages = optimizer._model_variables_moving_average if optimizer.use_ema else []
    return values_of([*variables, *optimizer.momentums, *averages])


@mode
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_a_step_is_never_longer_than_its_bound(jit_compile, outer, momentum, nesterov):
    """The norm of a step is at most learning_rate / (1 - momentum)."""
    variables = variables_of(random_arrays())
    optimizer = SNGM(0.1, momentum=momentum, nesterov=nesterov, jit_compile=jit_compile)
    # Gradients that point the same way make the longest steps.
    always = random_arrays(seed=3)
    apply = stepping(optimizer, variables, outer)
    for step, noise in enumerate(random_gradients()):
        before = values_of(variables)
        gradients = [a + 0.3 * (step % 3) * n for a, n in zip(always, noise, strict=True)]
        apply(gradients)
        moved = [now - then for now, then in zip(values_of(variables), before, strict=True)]
        assert np.sqrt(sum(np.sum(m * m) for m in moved)) <= 0.1 / (1 - momentum) * (1 + 1e-5)


@mode
@pytest.mark.parametrize("exponent", [60, -60])
def test_scaling_the_loss_changes_nothing(jit_compile, outer, exponent):
    trained = []
    for scale in (1.0, 2.0**exponent):
        variables = variables_of(random_arrays())
        train(SNGM(0.1, jit_compile=jit_compile), variables, random_gradients(scale=scale), outer)
        trained.append(values_of(variables))
    for plain, scaled in zip(*trained, strict=True):
        np.testing.assert_allclose(scaled, plain, rtol=1e-5, atol=1e-6)


@mode
@pytest.mark.parametrize("scale", [1e30, 3e37, 1e-30, 1e-35])
def test_gradients_of_any_magnitude_are_normalized(jit_compile, outer, scale):
    gradients = random_gradients(steps=5, scale=scale)
    assert_follows_the_reference(random_arrays(), gradients, outer, jit_compile)


@whole
@mode
@pytest.mark.parametrize("magnitudes", [(1e30, 1.0, 1e-30), (1e19, 1e19, 1e19), (3e37, 0.0, 1e-35)])
def test_blockwise_each_variable_may_have_its_own_magnitude(jit_compile, outer, magnitudes):
    start = random_arrays(SHAPES * 2)
    gradients = [
        [magnitudes[i % 3] * array for i, array in enumerate(arrays)]
        for arrays in random_gradients(SHAPES * 2, steps=5)
    ]
    assert_follows_the_reference(start, gradients, outer, jit_compile, blockwise=True)


@mode
def test_one_huge_entry_among_ordinary_ones(jit_compile, outer):
    variable = keras.Variable(np.zeros(4), dtype="float32")
    train(SNGM(1.0, jit_compile=jit_compile), [variable], [[[1e30, 1.0, -1e30, 0.0]]], outer)
    np.testing.assert_allclose(variable, [-(0.5**0.5), 0.0, 0.5**0.5, 0.0], atol=1e-6)


@mode
@pytest.mark.parametrize("scale", [1e-4, 1.0, 6e4])
def test_float16_gradients_neither_overflow_nor_underflow(jit_compile, outer, scale):
    """Gradients in float16 are normalized even if float16 cannot hold their squares."""
    variable = keras.Variable(np.zeros(256), dtype="float16")
    train(SNGM(1.0, jit_compile=jit_compile), [variable], [[np.full(256, scale)]], outer)
    np.testing.assert_allclose(variable, np.full(256, -1 / 16), rtol=1e-3)


@mode
def test_momentum_coasts_on_a_zero_gradient(jit_compile, outer):
    variables = variables_of(random_arrays())
    optimizer = SNGM(0.1, jit_compile=jit_compile)
    gradients = [*random_gradients(steps=1), [np.zeros_like(a) for a in random_arrays()]]
    reference = ReferenceSNGM(random_arrays())
    train(optimizer, variables, gradients, outer)
    for gradient in gradients:
        reference.step(gradient, 0.1)
    assert_close(variables, reference.w, 1e-6)
    assert_close(optimizer.momentums, reference.u, 1e-6)
    assert float(optimizer.gradient_norm) == 0.0
    assert int(optimizer.skipped_steps) == 0


def test_a_zero_gradient_at_the_start_moves_nothing():
    variable = keras.Variable([1.0, 2.0], dtype="float32")
    SNGM().apply([keras.ops.zeros(2)], [variable])
    np.testing.assert_array_equal(variable, [1.0, 2.0])


@mode
@pytest.mark.parametrize(
    "bad, clip",
    [
        (np.nan, {}),
        (np.inf, {}),
        (-np.inf, {}),
        (np.inf, {"clipnorm": 1.0}),
        (np.inf, {"clipvalue": 1.0}),
        (np.nan, {"global_clipnorm": 1.0}),
        (np.inf, {"blockwise": True}),
    ],
)
def test_a_non_finite_gradient_skips_the_step(jit_compile, outer, bad, clip):
    variables = variables_of(random_arrays())
    optimizer = SNGM(
        0.1,
        jit_compile=jit_compile,
        use_ema=True,
        ema_overwrite_frequency=2,
        weight_decay=0.1,
        **clip,
    )
    first, poisoned, third = random_gradients(steps=3)
    poisoned[2][1, 1] = bad
    train(optimizer, variables, [first], outer)
    variables[1].assign([-0.0, 0.0, 1.0])
    optimizer.momentums[1].assign([0.0, -0.0, 1.0])
    before = state_of(optimizer, variables)

    train(optimizer, variables, [poisoned], outer)
    for now, then in zip(state_of(optimizer, variables), before, strict=True):
        np.testing.assert_array_equal(now, then)
        # With `jit_compile=False` TensorFlow's kernel may lose the sign of a zero.
        if jit_compile is not False:
            assert now.tobytes() == then.tobytes()
    assert int(optimizer.skipped_steps) == 1
    assert not np.isfinite(optimizer.gradient_norm)
    assert list(np.isfinite(optimizer.gradient_norms)) == [True, True, False, True, True]

    train(optimizer, variables, [third], outer)
    assert int(optimizer.skipped_steps) == 1
    assert int(optimizer.iterations) == 3
    assert all(np.isfinite(value).all() for value in state_of(optimizer, variables))
    assert not np.array_equal(state_of(optimizer, variables)[1], before[1])


def test_a_skipped_first_step_does_not_spoil_the_average():
    variables = variables_of(random_arrays())
    optimizer = SNGM(0.1, use_ema=True)
    train(optimizer, variables, [[np.full_like(a, np.nan) for a in random_arrays()]])
    optimizer.finalize_variable_values(variables)
    assert_close(variables, random_arrays(), 1e-6)

    train(optimizer, variables, random_gradients(steps=1))
    after_one_step = values_of(variables)
    optimizer.finalize_variable_values(variables)
    for average, weight in zip(values_of(variables), after_one_step, strict=True):
        np.testing.assert_array_equal(average, weight)


@mode
def test_a_non_finite_micro_batch_drops_its_cycle(jit_compile, outer):
    variables = variables_of(random_arrays())
    optimizer = SNGM(0.1, gradient_accumulation_steps=2, jit_compile=jit_compile)
    gradients = random_gradients(steps=4)
    gradients[0][1][0] = np.nan
    train(optimizer, variables, gradients, outer)

    reference = ReferenceSNGM(random_arrays())
    reference.step([(a + b) / 2 for a, b in zip(*gradients[2:], strict=True)], 0.1)
    assert_close(variables, reference.w, 1e-5)
    assert int(optimizer.skipped_steps) == 1
