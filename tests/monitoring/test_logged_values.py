"""Tests that all values of GradientNormLogger equal those of gradients that tests compute anew."""

import functools
import pickle

import keras
import numpy as np
import pytest

from autodiff import gradients_of
from logged_cases import (
    BATCH,
    CASES,
    EPOCHS,
    HISTOGRAM_EVERY,
    LOG_EVERY,
    RATE,
    STEPS_PER_EPOCH,
    STRATEGIES,
)
from processes import SUPPORT, run_python
from reference import ReferenceSNGM, norm
from selection import cases_asked_for, quick_only

JOBS = [
    (name, strategy)
    for name, case in CASES.items()
    for strategy in case.strategies
    if strategy in STRATEGIES
]
QUICK_JOBS = [
    ("SNGM", "0"),
    ("SNGM, gradient changed", "2"),
    ("SNGM, noise scale, accumulated", "0"),
    ("SGD", "2"),
    ("SGD, accumulated, embedding", "0"),
    ("Adam", "0"),
]
job = pytest.mark.parametrize("name, strategy", quick_only(JOBS, QUICK_JOBS))


@pytest.fixture(scope="module")
def logged(request, tmp_path_factory):
    """Return a function of the name and the strategy of a job that returns the job's `Logged`.

    Only jobs of selected tests are run, those of one strategy in one process.
    """
    folder = tmp_path_factory.mktemp("logged")
    jobs = cases_asked_for(request, "name", "strategy")

    @functools.cache
    def results_of(strategy):
        names = [name for name, under in jobs if under == strategy]
        run_python(SUPPORT / "logged_training.py", strategy, folder / "results", *names)
        return pickle.loads((folder / "results").read_bytes())

    return lambda name, strategy: results_of(strategy)[name]


@pytest.fixture(scope="module")
def updates(logged):
    """Return a function of a job's name and strategy that lists its updates, see `updates_of`."""
    return functools.cache(lambda name, n: list(updates_of(CASES[name], logged(name, n))))


def updates_of(case, result):
    """Yield gradient, momentum, old and new weights for each update of a job, as lists of arrays.

    The gradient is computed anew, and with SNGM changed by weight decay and clipping. The momentum
    is an empty list if there is none.

    Args:
        case: the job.
        result: the `Logged` of the job.
    """
    gradients = recomputed_gradients(case)
    before = [np.zeros_like(weight) for weight in result.weights[0]]
    for first in range(0, EPOCHS * STEPS_PER_EPOCH, case.micro_batches):
        calls = [call % STEPS_PER_EPOCH for call in range(first, first + case.micro_batches)]
        batches = [slice(BATCH * call, BATCH * (call + 1)) for call in calls]
        old, new = result.weights[first], result.weights[first + case.micro_batches]
        gradient = gradients(old, batches)
        momentum = []
        if case.options is not None:
            reference = ReferenceSNGM(old, **case.options)
            reference.u = [np.array(u, "float64") for u in before]
            reference.step(gradient, RATE)
            gradient = reference.g
            if reference.beta:
                before = momentum = result.momenta[first + case.micro_batches - 1]
        yield gradient, momentum, old, new


def recomputed_gradients(case):
    """Return a function that computes the mean gradient of a job's model over batches.

    The function takes the weights, and slices of the data of an epoch.
    """
    model = case.model()
    x, y = case.data()

    def gradients(weights, batches):
        for variable, weight in zip(model.trainable_variables, weights):
            variable.assign(weight)
        each = [
            [
                keras.ops.convert_to_numpy(gradient).astype("float64")
                for gradient in gradients_of(model, x[rows], y[rows])
            ]
            for rows in batches
        ]
        return [np.mean(of, axis=0) for of in zip(*each)]

    return gradients


def expected_scalars(case, result, gradient, momentum, old, new):
    """Return the scalars of one update by name, for all variables together and for each.

    Args:
        case: the job.
        result: the `Logged` of the job.
        gradient: the gradient as it was measured.
        momentum: the momentum after the update; empty if there is none.
        old: the weights before the update.
        new: the weights after the update.
    """

    def of(part, ending):
        """Return the scalars of the variable with index `part`, or of all if `part` is `None`."""
        own = slice(None) if part is None else slice(part, part + 1)
        g, u, w = gradient[own], momentum[own], old[own]
        change = [(n.astype("float64") - o) for n, o in zip(new[own], old[own])]
        values = {
            "grad_norm": norm(g),
            "update_ratio": norm(change) / norm(w) if norm(w) else np.nan,
            "update_norm": norm(change),
            "weight_norm": norm(w),
        }
        if momentum:
            along = sum(np.sum(a.astype("float64") * b) for a, b in zip(u, g))
            values["momentum_norm"] = norm(u)
            values["momentum_cosine"] = along / (norm(u) * norm(g))
        return {key + ending: value for key, value in values.items()}

    values = of(None, "")
    for i, path in enumerate(result.paths):
        values |= of(i, f"/{path}")
    return values


@job
def test_every_scalar_equals_a_recomputation(logged, updates, name, strategy):
    case, result = CASES[name], logged(name, strategy)
    lines = {line.pop("step"): line for line in map(dict, result.lines)}
    last = EPOCHS * STEPS_PER_EPOCH // case.micro_batches
    assert list(lines) == list(range(LOG_EVERY, last + 1, LOG_EVERY))
    assert set(result.scalars) == set(lines)
    for step, update in enumerate(updates(name, strategy), start=1):
        if step not in lines:
            continue
        expected = expected_scalars(case, result, *update)
        noise = {"gradient_noise_scale"} if case.noise else set()
        assert set(lines[step]) == set(result.scalars[step]) == set(expected) | noise
        for key, value in expected.items():
            wanted = pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)
            assert lines[step][key] == wanted, key
            assert result.scalars[step][key] == wanted, key


@job
def test_epochs_hold_the_statistics_of_all_updates(logged, updates, name, strategy):
    case, result = CASES[name], logged(name, strategy)
    values = [expected_scalars(case, result, *update) for update in updates(name, strategy)]
    per_epoch = len(values) // EPOCHS
    for epoch in range(EPOCHS):
        own = values[epoch * per_epoch : (epoch + 1) * per_epoch]
        first = epoch * per_epoch + 1
        detailed = [v for step, v in enumerate(own, start=first) if step % LOG_EVERY == 0]
        norms = [v["grad_norm"] for v in own]
        expected = {"grad_norm_max": max(norms), "grad_norm_min": min(norms)}
        for key in values[0]:
            if key.startswith("grad_norm"):
                expected[key] = np.mean([v[key] for v in own])
            elif "/" not in key:
                expected[key] = np.mean([v[key] for v in detailed])
        noise = {"gradient_noise_scale"} if case.noise else set()
        assert set(result.history) == {"loss", *expected, *noise}
        for key, value in expected.items():
            assert result.history[key][epoch] == pytest.approx(value, rel=1e-5), key


@job
def test_histograms_count_the_elements(logged, updates, name, strategy):
    case, result = CASES[name], logged(name, strategy)
    last = EPOCHS * STEPS_PER_EPOCH // case.micro_batches
    assert set(result.histograms) == set(range(HISTOGRAM_EVERY, last + 1, HISTOGRAM_EVERY))
    for step, (gradient, momentum, _, _) in enumerate(updates(name, strategy), start=1):
        if step not in result.histograms:
            continue
        kinds = {"gradients": gradient, "momenta": momentum}
        expected = {
            f"{kind}/{path}": tensor
            for kind, tensors in kinds.items()
            for path, tensor in zip(result.paths, tensors)
        }
        assert set(result.histograms[step]) == set(expected)
        # An element is a sum over the batch, whose terms other compiled programs round differently.
        # Where the terms cancel, the rounding error does not become smaller with the sum.
        rounding = BATCH * np.finfo("float32").eps * norm(gradient)
        for key, tensor in expected.items():
            assert_counts(result.histograms[step][key], tensor, rounding)


@pytest.mark.parametrize(
    "name, strategy", quick_only([job for job in JOBS if CASES[job[0]].noise], QUICK_JOBS)
)
def test_the_noise_scale_equals_a_recomputation(logged, name, strategy):
    case, result = CASES[name], logged(name, strategy)
    gradients = recomputed_gradients(case)
    size = BATCH // max(int(strategy[0]), 1)
    noise, signal = 0.0, 0.0
    lines = {line["step"]: line for line in result.lines}
    for first in range(0, EPOCHS * STEPS_PER_EPOCH, case.micro_batches):
        begin = BATCH * (first % STEPS_PER_EPOCH)
        shards = range(begin, begin + BATCH * case.micro_batches, size)
        each = [gradients(result.weights[first], [slice(b, b + size)]) for b in shards]
        small = np.mean([norm(g) ** 2 for g in each])
        large = norm([np.mean(of, axis=0) for of in zip(*each)]) ** 2
        batch = size * len(each)
        signal = 0.9 * signal + 0.1 * (batch * large - size * small) / (batch - size)
        noise = 0.9 * noise + 0.1 * (small - large) / (1 / size - 1 / batch)
        step = first // case.micro_batches + 1
        if step in lines:
            expected = noise / signal if signal > 0 else np.inf
            assert lines[step]["gradient_noise_scale"] == pytest.approx(expected, rel=1e-4)
    assert result.history["gradient_noise_scale"][-1] == pytest.approx(expected, rel=1e-4)


def assert_counts(buckets, tensor, rounding):
    """Assert that a histogram has the range of a tensor and counts its elements.

    Because of rounding, an element at an edge may be counted in the next bucket.
    """
    left, right, counts = buckets.T
    tensor = tensor.astype("float64")
    assert counts.sum() == tensor.size
    tolerance = max(1e-5 * np.abs(tensor).max(), rounding)
    assert left[0] == pytest.approx(tensor.min(), abs=tolerance)
    assert right[-1] == pytest.approx(tensor.max(), abs=tolerance)
    np.testing.assert_allclose(left[1:], right[:-1])
    if tensor.size > 1:
        inside = np.clip(tensor, left[0], right[-1])
        wanted, _ = np.histogram(inside, bins=len(counts), range=(left[0], right[-1]))
        assert np.abs(np.cumsum(counts - wanted)).max() <= 1
