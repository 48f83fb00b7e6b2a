"""Test that loggers with random arguments log the right values, whatever happens in training.

The values are compared with those of `linear_model.py`.
"""

import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given

import linear_model
from linear_model import PATHS, Update
from problems import BACKEND
from random_logs import BATCH, OPTIMIZERS, PER_VARIABLE, jobs, run
from random_settings import random_settings
from reference import norm

TOLERANCE = 2e-4
# Compilation takes most of the time of a job, and PyTorch does not compile.
USUAL_JOBS = 30 if BACKEND == "torch" else 4


@random_settings(USUAL_JOBS)
@given(job=jobs())
def test_whatever_is_logged_is_right(job):
    with tempfile.TemporaryDirectory() as folder:
        result = run(job, pathlib.Path(folder))
    updates, ends, noise_scales = recomputed(job, result)
    for logger, logged in zip(job.loggers, result.logged):
        groups = {"": range(len(PATHS))}
        groups |= {f"/{name}": members for name, members in logger.groups.items()}
        rows = [
            {
                f"{key}{ending}": value
                for ending, members in groups.items()
                for key, value in update.scalars(members).items()
                if key == "grad_norm" or logger.update_ratio
            }
            for update in updates
        ]
        assert_rows_are_right(logger.log_every, rows, noise_scales, logged.rows)
        if logger.has_log_dir:
            assert_rows_are_right(logger.log_every, rows, noise_scales, logged.scalars)
            assert_histograms_are_right(logger, job, updates, logged.histograms)
        assert len(logged.epochs) == len(ends)
        for updates_of_epoch, logs in zip(ends, logged.epochs):
            assert_epoch_is_right(logger, rows, updates_of_epoch, noise_scales, logs)
    assert_warnings_are_right(job, updates, result.messages)


def recomputed(job, result):
    """Recompute the updates of a job in NumPy, from the micro-batches that it was trained on.

    Returns:
        All updates; for each completed epoch, the range of its updates' indices; and the noise
        scale after each update, empty if it is not measured.
    """
    _, simulated, rate = OPTIMIZERS[job.optimizer]
    optimizer = simulated(result.start, rate, job.options)
    data = [job.data(fit) for fit in range(len(job.fits))]
    weights, gradients = result.start, []
    updates, updates_before, noise_scales = [], [0], []
    noise = linear_model.NoiseScale(BATCH)
    has_stopped = False
    for micro_batch in result.witness.micro_batches:
        x, y = (
            of[BATCH * micro_batch.number : BATCH * (micro_batch.number + 1)].astype("float64")
            for of in data[micro_batch.fit]
        )
        gradients.append(linear_model.gradients_of(weights, x, y))
        before = weights
        if not has_stopped and is_complete(job, gradients):
            gradient = [np.sum(of, axis=0) / job.micro_batches for of in zip(*gradients)]
            has_stopped = job.on_nonfinite == "stop" and not np.isfinite(norm(gradient))
            if not has_stopped:
                gradient, weights = optimizer.step(weights, gradient)
            if job.has_noise_scale:
                noise.add(gradients)
                noise_scales.append(noise.copy())
            updates.append(Update(gradient, optimizer.momenta, before, weights))
            gradients = []
        if micro_batch.weights is not None:
            weights = seen(weights, micro_batch.weights)
        updates_before.append(len(updates))
    ends = [
        range(updates_before[epoch.start], updates_before[epoch.stop])
        for epoch in result.witness.epochs
    ]
    return updates, ends, noise_scales


def is_complete(job, gradients):
    """Return whether an update is made, or a logger stops training, after these micro-batches.

    Keras' optimizers cannot skip an update, so that a logger stops before it, at the first
    micro-batch whose gradient is not finite.

    Args:
        job: the job.
        gradients: the gradients of the micro-batches since the last update.
    """
    is_bad = not np.isfinite(norm(gradients[-1]))
    stops = is_bad and job.on_nonfinite == "stop" and job.optimizer != "SNGM"
    return len(gradients) == job.micro_batches or stops


def seen(expected, weights):
    """Assert that weights are close to the expected ones, and return the weights."""
    for value, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=TOLERANCE, atol=1e-5)
    return weights


def assert_rows_are_right(every, rows, noise_scales, logged):
    """Assert that a file or TensorBoard has the values of every update that is due.

    Args:
        every: the `log_every` of the logger.
        rows: the expected values of each update, by name.
        noise_scales: the noise scale after each update; empty if it is not measured.
        logged: the logged values, by step and name.
    """
    steps = range(every, len(rows) + 1, every)
    assert list(logged) == list(steps)
    for step in steps:
        values = dict(logged[step])
        if noise_scales:
            noise_scales[step - 1].assert_is(values.pop("gradient_noise_scale"), TOLERANCE)
        assert_close(values, rows[step - 1])


def assert_epoch_is_right(logger, rows, updates, noise_scales, logs):
    """Assert that the `logs` of an epoch hold the right values of one logger.

    Other loggers put their values into the same `logs`, so these may hold more.
    """
    expected = {}
    for key in rows[0] if rows else ["grad_norm"]:
        is_detail = not key.startswith("grad_norm")
        if is_detail and "/" in key:
            continue
        values = [rows[i][key] for i in updates if not (is_detail and (i + 1) % logger.log_every)]
        expected[key] = np.mean(values) if values else np.nan
        if key == "grad_norm":
            expected["grad_norm_max"] = np.max(values) if values else np.nan
            expected["grad_norm_min"] = np.min(values) if values else np.nan
    assert_close({key: logs[key] for key in expected}, expected)
    if noise_scales and updates:
        noise_scales[updates[-1]].assert_is(logs["gradient_noise_scale"], TOLERANCE)


def assert_close(values, expected):
    assert values == pytest.approx(expected, rel=TOLERANCE, abs=1e-5, nan_ok=True)


def assert_histograms_are_right(logger, job, updates, logged):
    """Assert that histograms have the right steps, names, ranges and numbers of elements."""
    _, names = PER_VARIABLE["kernels" if logger.per_variable == "kernels" else "variables"]
    expected = {}
    every = logger.histogram_every or len(updates) + 1
    for step in range(every, len(updates) + 1, every):
        update = updates[step - 1]
        tensors = {f"gradients/{name}": update.gradient[i] for name, (i,) in names.items()}
        if job.has_momentum:
            tensors |= {f"momenta/{name}": update.momenta[i] for name, (i,) in names.items()}
        tensors = {name: t for name, t in tensors.items() if np.isfinite(t).all()}
        if tensors:
            expected[step] = tensors
    assert list(logged) == list(expected)
    for step, tensors in expected.items():
        assert set(logged[step]) == set(tensors)
        for name, tensor in tensors.items():
            left, right, counts = logged[step][name].T
            assert counts.sum() == tensor.size
            assert left[0] == pytest.approx(tensor.min(), rel=TOLERANCE, abs=1e-5)
            assert right[-1] == pytest.approx(tensor.max(), rel=TOLERANCE, abs=1e-5)


def assert_warnings_are_right(job, updates, messages):
    """Assert that loggers warn of the first gradient that is not finite, and of nothing else."""
    bad = [step for step, u in enumerate(updates, start=1) if not np.isfinite(norm(u.gradient))]
    faults = [message for message in messages if "is not finite" in message]
    expected = len(job.loggers) if bad and job.on_nonfinite != "ignore" else 0
    assert len(faults) == expected
    for message in faults:
        assert f"The gradient of step {bad[0]} is not finite" in message
        assert all(path in message for path in PATHS)
    others = set(messages) - set(faults)
    assert not [message for message in others if "GradientNormLogger" in message]
    assert not [message for message in others if "not logged" in message]
