"""Tests that training and logging do not depend on how JAX distributes them over devices."""

import math
import pickle

import numpy as np
import pytest

from jax_training import DATA_PARALLEL, LOGGED, MODEL_PARALLEL, PLACES, STEPS_BEFORE_STOP, STOPPED
from processes import run_python
from replica_options import EPOCHS, FAULTS, OPTIONS, STEPS_PER_EPOCH, frozen

DEVICES = max(DATA_PARALLEL, math.prod(MODEL_PARALLEL))
distributed = pytest.mark.parametrize(
    "placement", [place for place in PLACES if place != "one device"]
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Train on one device and distributed, in a new process; return results by place and job."""
    path = tmp_path_factory.mktemp("jax") / "results"
    run_python(
        "-c",
        f"import jax_training; jax_training.main({str(path)!r})",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}",
    )
    return pickle.loads(path.read_bytes())


def assert_close(got, expected, tolerance):
    """Assert for each array that norm(error) <= tolerance * norm(expected array)."""
    for value, wanted in zip(got, expected, strict=True):
        assert np.linalg.norm(value - wanted) <= tolerance * np.linalg.norm(wanted)


def assert_trained_alike(got, expected, tolerance):
    """Assert that two outcomes agree in weights, state and skipped steps."""
    assert_close([*got.weights, *got.state], [*expected.weights, *expected.state], tolerance)
    assert len(got.norms) == EPOCHS * STEPS_PER_EPOCH
    assert got.skipped_steps == expected.skipped_steps


@distributed
@pytest.mark.parametrize("name", OPTIONS)
def test_devices_train_like_one(results, name, placement):
    got, expected = results[placement][name].outcome, results["one device"][name].outcome
    assert_trained_alike(got, expected, OPTIONS[name].tolerance)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=OPTIONS[name].tolerance)
    assert got.skipped_steps == 0


@distributed
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_one_device_skips_the_step(results, name, placement):
    """A step with a bad sample on one device changes nothing on any device, to the bit."""
    got, expected = results[placement][name].outcome, results["one device"][name].outcome
    assert_trained_alike(got, expected, FAULTS[name].tolerance)
    assert not got.changed_by_bad_batches
    assert not expected.changed_by_bad_batches
    if not FAULTS[name].loss_scale:
        assert got.skipped_steps == EPOCHS
        np.testing.assert_allclose(got.norms, expected.norms, rtol=FAULTS[name].tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_momentum_is_divided_like_its_variable(results, name):
    result = results["ModelParallel"][name]
    assert result.momentum_shardings == result.shardings
    # With frozen layers only the head is trained, whose 5 rows 3 devices cannot share.
    assert any("model" in axes for axes in result.shardings) == (OPTIONS[name].layers is not frozen)


def test_data_parallel_variables_are_on_every_device(results):
    for name in OPTIONS:
        result = results["DataParallel"][name]
        assert result.momentum_shardings == result.shardings
        assert not any(axis for axes in result.shardings for axis in axes)


@distributed
@pytest.mark.parametrize("name", LOGGED)
def test_the_logger_logs_what_it_logs_on_one_device(results, name, placement):
    got, expected = (results[place][f"{name}, logged"] for place in (placement, "one device"))
    assert list(got.history) == list(expected.history)
    for key, values in expected.history.items():
        assert got.history[key] == pytest.approx(values, rel=1e-4)
    assert len(got.lines) == len(expected.lines) > 0
    for line, wanted in zip(got.lines, expected.lines, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)
    assert list(got.scalars) == list(expected.scalars)
    for step, scalars in expected.scalars.items():
        assert got.scalars[step] == pytest.approx(scalars, rel=1e-4)
    assert list(got.histograms) == list(expected.histograms)
    for step, histograms in expected.histograms.items():
        for tag, histogram in histograms.items():
            np.testing.assert_allclose(
                got.histograms[step][tag], histogram, rtol=1e-4, atol=1e-6 * np.abs(histogram).max()
            )


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("optimizer", STOPPED)
def test_the_logger_stops_at_a_nan_with_the_weights_from_before(results, optimizer, placement):
    stopped = results[placement][f"{optimizer}, stopped"]
    (message,) = (text for text in stopped.warnings if "not finite" in text)
    assert f"step {STEPS_BEFORE_STOP + 1} is not finite" in message
    assert_close(stopped.weights, stopped.weights_before, 1e-6)
