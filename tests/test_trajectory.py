"""Tests of the trajectory of the weights: SNGM takes the steps of the paper."""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM
from problems import (
    DTYPES,
    MODES,
    QUICK_MODES,
    SCHEDULE,
    SHAPES,
    assert_close,
    compare_with_reference,
    modes,
    random_arrays,
    random_gradients,
    train,
    values_of,
    variables_of,
)
from reference import ReferenceSNGM
from selection import quick_only, whole

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1.5e-1}
MOST_MODES = modes("eager-xla", "function", "xla-function")


@pytest.mark.parametrize("mode", quick_only(MODES, QUICK_MODES))
@pytest.mark.parametrize("momentum, nesterov", [(0.9, False), (0.9, True), (0.99, False)])
def test_agrees_with_the_reference(mode, momentum, nesterov):
    compare_with_reference(mode, momentum=momentum, nesterov=nesterov)


@pytest.mark.parametrize("mode", quick_only(MODES, QUICK_MODES))
@pytest.mark.parametrize("nesterov", [False, True])
def test_agrees_with_the_reference_without_momentum(mode, nesterov):
    jit_compile, outer = MODES[mode]
    variables = variables_of(random_arrays())
    optimizer = SNGM(SCHEDULE, momentum=0.0, nesterov=nesterov, jit_compile=jit_compile)
    reference = ReferenceSNGM(random_arrays(), momentum=0.0, nesterov=nesterov)
    train(optimizer, variables, random_gradients(), outer)
    for t, gradient in enumerate(random_gradients()):
        reference.step(gradient, float(SCHEDULE(t)))
    assert_close(variables, reference.w, 1e-5)
    assert optimizer.momentums == []


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_may_be_set_to_zero_and_back(nesterov):
    start, gradients = random_arrays(), random_gradients(steps=9)
    variables = variables_of(start)
    optimizer = SNGM(0.1, nesterov=nesterov)
    reference = ReferenceSNGM(start, nesterov=nesterov)
    for t, momentum in enumerate([0.9, 0.0, 0.5]):
        optimizer.momentum = reference.beta = momentum
        train(optimizer, variables, gradients[3 * t : 3 * t + 3])
        for gradient in gradients[3 * t : 3 * t + 3]:
            reference.step(gradient, 0.1)
        assert_close(variables, reference.w, 1e-5)
        assert_close(optimizer.momentums, reference.u, 1e-5)


@pytest.mark.parametrize("mode", quick_only(MOST_MODES, QUICK_MODES))
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float32"])
def test_agrees_with_the_reference_in_every_dtype(mode, dtype):
    # Schedules return float32, so the rate is a number that float32 and float64 both hold.
    compare_with_reference(mode, TOLERANCE[dtype], dtype, rate=0.125)


@pytest.mark.parametrize("mode", quick_only(MOST_MODES, QUICK_MODES))
def test_agrees_with_the_reference_in_mixed_dtypes(mode):
    dtypes = [DTYPES[0], "float32", "float16", "float32", "bfloat16"]
    compare_with_reference(mode, TOLERANCE["bfloat16"], dtypes)


@pytest.mark.parametrize("mode", quick_only(MOST_MODES, QUICK_MODES))
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.05},
        {"weight_decay": 0.05, "decoupled_weight_decay": False},
        {"clipvalue": 0.3},
        {"clipnorm": 1.5},
        {"global_clipnorm": 2.0},
        {"global_clipnorm": 1e6},
        {"clipnorm": 1.5, "weight_decay": 0.5, "decoupled_weight_decay": False, "nesterov": True},
        {"blockwise": True},
        {"blockwise": True, "clipnorm": 1.5, "weight_decay": 0.5, "decoupled_weight_decay": False},
        {"blockwise": True, "global_clipnorm": 2.0},
    ],
    ids=str,
)
def test_options_agree_with_the_reference(mode, options):
    compare_with_reference(mode, **options)


@pytest.mark.parametrize("mode", modes("eager-xla"))
@pytest.mark.parametrize("clipnorm", [1e-6, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_clipping_agrees_with_the_reference_at_any_scale(mode, clipnorm, scale):
    optimizer, reference = compare_with_reference(mode, scale=scale, clipnorm=clipnorm)
    np.testing.assert_allclose(optimizer.gradient_norm, reference.gradient_norm, rtol=1e-5)


@whole
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_agrees_with_optax(momentum, nesterov):
    import jax
    import optax

    rate = 0.25
    rule = optax.chain(
        optax.normalize_by_update_norm(eps=0.0),
        optax.trace(momentum, nesterov=nesterov),
        optax.scale_by_learning_rate(rate),
    )
    variables = variables_of(random_arrays())
    optimizer = SNGM(rate, momentum=momentum, nesterov=nesterov)
    train(optimizer, variables, random_gradients())

    weights = [jax.numpy.asarray(a, "float32") for a in random_arrays()]
    state = rule.init(weights)
    for gradients in random_gradients():
        gradients = [jax.numpy.asarray(a, "float32") for a in gradients]
        updates, state = rule.update(gradients, state)
        weights = optax.apply_updates(weights, updates)
    assert_close(variables, [np.asarray(w, "float64") for w in weights], 1e-5)


def test_gradient_norms_are_those_of_each_variable():
    variables = variables_of(random_arrays())
    optimizer = SNGM()
    gradients = random_gradients(steps=1)
    train(optimizer, variables, gradients)
    norms = [np.linalg.norm(g) for g in gradients[0]]
    np.testing.assert_allclose(optimizer.gradient_norms, norms, rtol=1e-6)
    np.testing.assert_allclose(optimizer.gradient_norm, np.linalg.norm(norms), rtol=1e-6)


@pytest.mark.parametrize("mode", quick_only(MOST_MODES, QUICK_MODES))
@pytest.mark.parametrize("k", [2, 4])
def test_accumulated_micro_batches_train_like_the_whole_batch(mode, k):
    jit_compile, outer = MODES[mode]
    micro = random_gradients(steps=12 * k)
    means = [
        [np.mean(parts, axis=0) for parts in zip(*micro[i : i + k], strict=True)]
        for i in range(0, len(micro), k)
    ]
    options = {"weight_decay": 0.1, "use_ema": True, "ema_overwrite_frequency": 5}
    trained = []
    for gradients, steps in ((means, None), (micro, k)):
        variables = variables_of(random_arrays())
        optimizer = SNGM(0.1, jit_compile=jit_compile, gradient_accumulation_steps=steps, **options)
        train(optimizer, variables, gradients, outer)
        assert int(optimizer.iterations) == len(means)
        trained.append((variables, optimizer))
    (whole, _), (accumulated, optimizer) = trained
    assert_close(accumulated, values_of(whole), 1e-6)
    np.testing.assert_allclose(
        optimizer.gradient_norm, np.sqrt(sum(np.sum(m * m) for m in means[-1])), rtol=1e-6
    )


@pytest.mark.parametrize("mode", quick_only(MODES, QUICK_MODES))
@pytest.mark.parametrize("frequency", [None, 7])
def test_moving_averages_follow_keras(mode, frequency):
    """A moving average is w after the first step, then moves to w by a share 1 - ema_momentum."""
    jit_compile, outer = MODES[mode]
    variables = variables_of(random_arrays())
    optimizer = SNGM(
        SCHEDULE,
        use_ema=True,
        ema_momentum=0.8,
        ema_overwrite_frequency=frequency,
        jit_compile=jit_compile,
    )
    train(optimizer, variables, random_gradients(), outer)

    reference = ReferenceSNGM(random_arrays())
    averages = None
    for t, gradients in enumerate(random_gradients()):
        reference.step(gradients, float(SCHEDULE(t)))
        if averages is None:
            averages = reference.w
        averages = [0.8 * a + 0.2 * w for a, w in zip(averages, reference.w, strict=True)]
        if frequency and (t + 1) % frequency == 0:
            reference.w = averages
    assert_close(variables, reference.w, 1e-5)
    optimizer.finalize_variable_values(variables)
    assert_close(variables, averages, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_other_dtypes_are_cast(dtype):
    variable = keras.Variable([1.0, 2.0], dtype="float32")
    optimizer = SNGM(0.5)
    optimizer.apply([keras.ops.convert_to_tensor([3.0, 4.0], dtype)], [variable])
    np.testing.assert_allclose(variable, [1.0 - 0.3, 2.0 - 0.4], rtol=1e-6)


def test_all_ranks_are_covered():
    assert [len(shape) for shape in SHAPES] == [0, 1, 2, 3, 4]
