"""Tests that the statistics of an epoch equal those of NumPy over all updates of the epoch."""

import math

import numpy as np
import pytest

from keras_sngm.monitoring.epoch_statistics import EpochStatistics

NAMES = ["grad_norm", "gradient_noise_scale", "grad_norm/a", "update_ratio"]
HUGE = float(np.finfo("float32").max)
NORMS = {
    "one": [3.0],
    "some": [3.0, 0.1, 7.0, 2.0],
    "huge": [HUGE] * 5,
    "infinite": [1.0, math.inf, 2.0, math.inf],
    "NaN at first": [math.nan, 1.0, 2.0],
    "NaN at last": [1.0, 2.0, math.nan],
    "NaN and infinity": [math.inf, math.nan, 1.0],
}


@pytest.mark.parametrize("part", [1, 2, 100])
@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
def test_statistics_equal_those_of_all_updates(norms, part):
    statistics = EpochStatistics(NAMES)
    for begin in range(0, len(norms), part):
        values = np.array(norms[begin : begin + part])
        statistics.add({"grad_norm": values, "gradient_noise_scale": values, "grad_norm/a": values})
    expected = {
        "grad_norm": np.mean(norms),
        "grad_norm_max": np.max(norms),
        "grad_norm_min": np.min(norms),
        "gradient_noise_scale": norms[-1],
        "grad_norm/a": np.mean(norms),
        "update_ratio": math.nan,
    }
    logs = statistics.end()
    assert list(logs) == list(expected)
    assert logs == pytest.approx(expected, rel=1e-15, nan_ok=True)
    assert all(type(value) is float for value in logs.values())


def test_single_numbers_count_as_updates_and_other_names_are_left_out():
    statistics = EpochStatistics(["update_ratio"])
    for ratio in (1.0, 2.0, 6.0):
        statistics.add({"update_ratio": ratio, "update_ratio/a": 5.0})
    assert statistics.end() == {"update_ratio": 3.0}


def test_an_epoch_begins_anew():
    statistics = EpochStatistics(["grad_norm"])
    statistics.add({"grad_norm": np.array([1.0, 5.0])})
    statistics.end()
    statistics.add({"grad_norm": np.array([2.0])})
    assert set(statistics.end().values()) == {2.0}


def test_an_epoch_without_updates_has_no_values():
    statistics = EpochStatistics(NAMES)
    statistics.add(dict.fromkeys(NAMES, np.zeros(0)))
    logs = statistics.end()
    assert {"grad_norm_max", "grad_norm_min", *NAMES} == set(logs)
    assert all(math.isnan(value) for value in logs.values())


def test_means_of_millions_of_updates_are_accurate():
    statistics = EpochStatistics(["grad_norm"])
    norms = np.random.default_rng(0).lognormal(sigma=3.0, size=2_000_000)
    for part in np.split(norms, 10_000):
        statistics.add({"grad_norm": part})
    mean = math.fsum(norms) / len(norms)
    assert statistics.end()["grad_norm"] == pytest.approx(mean, rel=1e-12)
