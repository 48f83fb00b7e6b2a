"""Tests of several workers: they learn what one would, even if one of them dies on the way."""

import itertools
import json
import signal
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import multi_worker
from processes import ROOT, SUPPORT, free_ports, run_together

WORKER = ROOT / "examples" / "multi_worker.py"
DYING_WORKER = SUPPORT / "dying_worker.py"
# There are three epochs of four steps, so that the checkpoint is inside the second epoch. Many
# more steps would amplify the rounding errors by which the runs differ.
STEPS, CHECKPOINT = 12, 5
ARGUMENTS = ["--quick", "--epochs", "3", "--checkpoint-every", str(CHECKPOINT)]


def run_job(programs, output, keras_home):
    """Run one worker per program until all have ended; return how each has ended."""
    arguments = [*ARGUMENTS, "--output", output]
    environment = {"KERAS_HOME": str(keras_home), "TMPDIR": str(output.parent)}
    configs = tf_configs(len(programs))
    return run_together(
        [
            ([program, *arguments], {**environment, "TF_CONFIG": config})
            for program, config in zip(programs, configs, strict=True)
        ]
    )


def tf_configs(workers):
    """Return the TF_CONFIG of each worker on this machine; that of a single worker is empty."""
    if workers == 1:
        return ["{}"]
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(workers)]}
    return [
        json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})
        for i in range(workers)
    ]


def state_of(output):
    """Return the weights and the optimizer state of the model that a finished job has saved."""
    model = keras.saving.load_model(output / "model.keras")
    assert model.optimizer.iterations.numpy() == STEPS
    return [v.numpy() for v in [*model.trainable_variables, *model.optimizer.variables]]


def test_a_job_outlives_a_worker(tmp_path):
    alone, output, keras_home = tmp_path / "alone", tmp_path / "output", tmp_path / "keras"
    (undisturbed,) = run_job([WORKER], alone, keras_home)
    assert undisturbed.status == 0, undisturbed.printed
    assert "Resumed" not in undisturbed.printed

    survivor, victim = run_job([WORKER, DYING_WORKER], output, keras_home)
    assert victim.status == -signal.SIGKILL, victim.printed
    assert survivor.status == 1, survivor.printed
    assert "UnavailableError" in survivor.printed

    workers = run_job([WORKER, WORKER], output, keras_home)
    for worker in workers:
        assert worker.status == 0, worker.printed
        assert f"Resumed at step {CHECKPOINT}\n" in worker.printed
        assert "retracing" not in worker.printed
    assert ["Test accuracy" in worker.printed for worker in workers] == [True, False]
    assert [path.name for path in output.iterdir()] == ["model.keras"]
    for value, expected in zip(state_of(output), state_of(alone), strict=True):
        assert np.linalg.norm(value - expected) <= 1e-5 * np.linalg.norm(expected)


def batches_of(worker, workers, replicas, done):
    """Return the numbers of the samples in a worker's batches, one row per batch.

    Args:
        worker: the index of the worker.
        workers: the number of workers.
        replicas: the number of replicas of each worker, whose parts of a batch are joined.
        done: the number of batches to leave out.
    """
    context = tf.distribute.InputContext(workers, worker, workers * replicas)
    strategy = types.SimpleNamespace(distribute_datasets_from_function=lambda f: f(context))
    parts = multi_worker.batches(strategy, tf.data.Dataset.range(43), 12, epochs=3, done=done)
    return np.array([part.numpy() for part in parts]).reshape(-1, 12 // workers)


def test_an_epoch_shows_samples_once_and_in_its_own_order():
    epochs = batches_of(worker=0, workers=1, replicas=1, done=0).reshape(3, 36)
    for epoch in epochs:
        assert len(set(epoch)) == 36
    for one, other in itertools.combinations(epochs, 2):
        assert list(one) != list(other)


@pytest.mark.parametrize("workers, replicas", [(1, 1), (1, 2), (2, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("done", [0, 1, 3, 5, 8])
def test_workers_share_the_batches_of_one(workers, replicas, done):
    whole = batches_of(worker=0, workers=1, replicas=1, done=0)[done:]
    shares = [batches_of(worker, workers, replicas, done) for worker in range(workers)]
    np.testing.assert_array_equal(np.sort(np.hstack(shares)), np.sort(whole))


@pytest.mark.parametrize(
    "jobs, task, expected",
    [
        ([], None, True),
        (["worker"], ("worker", 0), True),
        (["worker"], ("worker", 1), False),
        (["chief", "worker"], ("chief", 0), True),
        (["chief", "worker"], ("worker", 0), False),
    ],
)
def test_there_is_one_chief(jobs, task, expected, monkeypatch):
    config = {"cluster": {job: ["localhost:1", "localhost:2"] for job in jobs}}
    if task is not None:
        config["task"] = dict(zip(("type", "index"), task))
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert multi_worker.is_chief(types.SimpleNamespace(cluster_resolver=resolver)) == expected
