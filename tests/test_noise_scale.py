"""Tests of the gradient noise scale on a quadratic problem whose covariance is known.

The loss of a sample x is norm(w - x)^2 / 2. Its gradient is w - x, so that the expected gradient is
w - mean(x), and the covariance of a sample's gradient is that of x.
"""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM
from problems import IN_GRAPH, stepping, tensors_of, values_of

DEVIATIONS = np.array([3.0, 1.0, 0.5, 2.0, 1.5])
GRADIENT = np.array([0.5, -1.0, 0.0, 0.3, 0.8])
NOISE, SIGNAL = np.sum(DEVIATIONS**2), np.sum(GRADIENT**2)
SAMPLES, MICRO_BATCHES, UPDATES = 8, 4, 1_500


def optimizer(momentum=0.0, rate=0.0, **options):
    """Return an SNGM that measures the noise scale of four micro-batches of eight samples."""
    return SNGM(
        rate,
        gradient_accumulation_steps=MICRO_BATCHES,
        noise_scale_batch_size=SAMPLES,
        noise_scale_momentum=momentum,
        **options,
    )


def gradients_of_small_batches(updates=UPDATES, seed=0):
    """Return random gradients of small batches, shape (updates, micro-batches, elements)."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((updates, MICRO_BATCHES, SAMPLES, len(DEVIATIONS)))
    return GRADIENT - np.mean(x * DEVIATIONS, axis=2)


def moments_of(sngm, gradients):
    """Take steps, and return the averages behind the noise scale, one row per update."""
    # The noise scale is that of all variables together, so there are two of them.
    variables = [keras.Variable(np.zeros(2)), keras.Variable(np.zeros(3))]
    step = stepping(sngm, variables, IN_GRAPH)
    moments = []
    for update in gradients:
        for gradient in update:
            step([gradient[:2], gradient[2:]])
        moments += values_of([sngm.noise_moments])
    return np.array(moments)


def brute_force(gradients):
    """Estimate tr(Sigma) and norm(G)^2 from the small batches of all updates together.

    The estimates come from sample covariance and mean, without the formula under test.
    """
    small = gradients.reshape(-1, gradients.shape[-1])
    noise = SAMPLES * np.sum(np.var(small, axis=0, ddof=1))
    return noise, np.sum(np.mean(small, axis=0) ** 2) - noise / SAMPLES / len(small)


def test_estimates_are_unbiased_over_repetitions():
    moments = moments_of(optimizer(), gradients_of_small_batches())
    for values, true in ((moments[:, 0], NOISE), (moments[:, 1], SIGNAL)):
        standard_error = np.std(values, ddof=1) / np.sqrt(UPDATES)
        assert standard_error < 0.1 * true
        assert abs(np.mean(values) - true) < 3 * standard_error


@pytest.mark.parametrize("scale", [1.0, 1e-16, 1e15])
def test_an_estimate_is_that_of_its_update(scale):
    """The estimates of an update are those of its own micro-batches.

    The estimate of tr(Sigma) is a sample variance, which is unbiased.
    """
    gradients = gradients_of_small_batches(20)
    moments = moments_of(optimizer(), scale * gradients).astype("float64")
    expected = [brute_force(update[np.newaxis]) for update in gradients]
    np.testing.assert_allclose(moments[:, :2] / scale**2, expected, rtol=1e-4, atol=1e-4)


def test_the_average_matches_brute_force():
    sngm = optimizer(momentum=0.998)
    gradients = gradients_of_small_batches()
    moments = moments_of(sngm, gradients)
    noise, signal = brute_force(gradients)
    weights = 0.998 ** np.arange(UPDATES)[::-1]
    effective = weights.sum() ** 2 / np.sum(weights**2)
    single = np.array([brute_force(update[np.newaxis]) for update in gradients])
    errors = np.std(single, axis=0) / np.sqrt(effective)
    averages = moments[-1, :2] / moments[-1, 2]
    assert np.all(np.abs(averages - [noise, signal]) < 3 * errors)
    relative = 3 * np.sqrt(np.sum((errors / [noise, signal]) ** 2))
    assert relative < 0.4
    assert float(sngm.gradient_noise_scale) == pytest.approx(NOISE / SIGNAL, rel=relative)


def test_noise_scale_is_the_quotient_of_averages():
    sngm = optimizer(momentum=0.9)
    moments = moments_of(sngm, gradients_of_small_batches(30))
    single = np.array(
        [brute_force(update[np.newaxis]) for update in gradients_of_small_batches(30)]
    )
    weights = 0.1 * 0.9 ** np.arange(30)[::-1]
    np.testing.assert_allclose(moments[-1, :2], weights @ single, rtol=1e-4)
    assert moments[-1, 2] == pytest.approx(weights.sum())
    expected = (weights @ single)[0] / (weights @ single)[1]
    assert float(sngm.gradient_noise_scale) == pytest.approx(expected, rel=1e-4)


def test_before_the_first_update_and_without_signal():
    """The noise scale is 0 before the first update.

    It is the largest float32 while the estimate of norm(G)^2 is not positive.
    """
    sngm = optimizer()
    sngm.build([keras.Variable(np.zeros(2)), keras.Variable(np.zeros(3))])
    assert sngm.gradient_noise_scale.numpy() == 0.0
    sngm = optimizer()
    # Micro-batches that cancel each other make the estimate of norm(G)^2 negative.
    signs = np.array([1.0, -1.0, 1.0, -1.0])[:, np.newaxis]
    moments = moments_of(sngm, [signs * np.ones(5)])
    assert moments[0, 1] < 0
    assert sngm.gradient_noise_scale.numpy() == np.finfo("float32").max


def test_skipped_steps_do_not_count():
    gradients = gradients_of_small_batches(3)
    spoilt = gradients.copy()
    spoilt[1, 2, 0] = np.nan
    sngm, other = optimizer(momentum=0.9), optimizer(momentum=0.9)
    moments = moments_of(sngm, spoilt)
    np.testing.assert_array_equal(moments[1], moments[0])
    np.testing.assert_allclose(moments[2], moments_of(other, gradients[[0, 2]])[1], rtol=1e-6)


def test_training_is_not_changed():
    measuring = optimizer(rate=0.1)
    plain = SNGM(0.1, gradient_accumulation_steps=MICRO_BATCHES)
    results = []
    for sngm in (measuring, plain):
        variable = keras.Variable(np.zeros(5))
        for gradient in gradients_of_small_batches(5).reshape(-1, 5):
            sngm.apply(tensors_of([gradient], [variable]), [variable])
        results.append(variable.numpy())
    np.testing.assert_array_equal(*results)


def test_averages_are_saved_inside_a_cycle_too(tmp_path):
    """A model that is saved inside an accumulation cycle keeps the averages of the noise scale."""
    x = np.random.default_rng(0).standard_normal((48, 3)).astype("float32")

    def model():
        keras.utils.set_random_seed(0)
        made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        made.compile(optimizer=optimizer(momentum=0.9, rate=0.05), loss="mse")
        return made

    def fit(made, begin, end):
        made.fit(x[begin:end], x[begin:end, :1], SAMPLES, verbose=0, shuffle=False)

    whole, halves = model(), model()
    fit(whole, 0, 48)
    fit(halves, 0, 16)
    halves.save(tmp_path / "model.keras")
    halves = keras.saving.load_model(tmp_path / "model.keras")
    fit(halves, 16, 48)
    for value, expected in zip(
        values_of(halves.optimizer.variables), values_of(whole.optimizer.variables)
    ):
        np.testing.assert_array_equal(value, expected)
    assert np.isfinite(halves.optimizer.gradient_noise_scale.numpy())


def test_one_small_batch_is_refused():
    sngm = SNGM(noise_scale_batch_size=8)
    with pytest.raises(
        ValueError, match=r"needs several batches.*Received: noise_scale_batch_size=8.*1 replica"
    ):
        sngm.apply([keras.ops.ones(2)], [keras.Variable([1.0, 2.0])])


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_bad_batch_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"`noise_scale_batch_size` must be .*Received: .*={size}"):
        SNGM(noise_scale_batch_size=size)


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1, "0.9"])
def test_bad_momenta_are_refused(momentum):
    with pytest.raises(
        ValueError, match=f"`noise_scale_momentum` must be .*Received: .*={momentum}"
    ):
        SNGM(noise_scale_momentum=momentum)
