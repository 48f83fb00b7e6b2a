"""Tests of several processes on JAX: they learn with `fit` what one would, even if one dies."""

import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import multi_worker_jax
from processes import ROOT, SUPPORT, free_ports, run_python, run_together

PROGRAM = ROOT / "examples" / "multi_worker_jax.py"
DYING_PROGRAM = SUPPORT / "dying_jax_process.py"
STEPS = 12  # There are three epochs of four steps.
ARGUMENTS = ["--quick", "--epochs", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multi_worker_jax")


@pytest.fixture(scope="module")
def alone(folder):
    """Return the weights and the optimizer state that one process trains."""
    output = folder / "alone"
    printed = start(output, "--processes", "1")
    assert "Test accuracy" in printed
    assert "Resumed" not in printed
    return values_of(output)


def start(output, *arguments):
    """Run the example, in two processes unless the arguments say otherwise; return its output."""
    home = str(output.parent / "keras")
    return run_python(PROGRAM, *ARGUMENTS, "--output", output, *arguments, KERAS_HOME=home)


def start_each(programs, output):
    """Run each program by its own command, as on several machines; return how each ended."""
    (port,) = free_ports(1)
    shared = {
        "KERAS_HOME": str(output.parent / "keras"),
        "JAX_PLATFORMS": "cpu",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"localhost:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(len(programs)),
    }
    return run_together(
        [
            (
                [program, *ARGUMENTS, "--output", output],
                {**shared, "KERAS_DISTRIBUTION_PROCESS_ID": str(i)},
            )
            for i, program in enumerate(programs)
        ]
    )


def values_of(output):
    """Check the files of a finished job; return its weights and its optimizer state."""
    assert sorted(path.name for path in output.iterdir()) == ["model.keras", "norms.csv"]
    steps = [line.split(",")[0] for line in (output / "norms.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(1, STEPS + 1)]
    model = keras.saving.load_model(output / "model.keras")
    assert int(model.optimizer.iterations) == STEPS
    return [v.numpy() for v in [*model.trainable_variables, *model.optimizer.variables]]


def assert_equal(values, expected):
    """Assert that arrays are equal up to a relative error of 1e-5."""
    for value, wanted in zip(values, expected, strict=True):
        assert np.linalg.norm(value - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_two_processes_learn_what_one_would(folder, alone):
    output = folder / "two"
    assert start(output).count("Test accuracy") == 1
    assert_equal(values_of(output), alone)


def test_a_job_goes_on_after_a_process_died(folder, alone):
    output = folder / "died"
    victim, survivor = start_each([DYING_PROGRAM, PROGRAM], output)
    assert victim.status == -signal.SIGKILL, victim.printed
    assert survivor.status != 0, survivor.printed

    processes = start_each([PROGRAM, PROGRAM], output)
    for process in processes:
        assert process.status == 0, process.printed
        assert "Resumed after epoch 1\n" in process.printed
    assert ["Test accuracy" in process.printed for process in processes] == [True, False]
    assert_equal(values_of(output), alone)


def batches_of(epochs):
    """Return the sample numbers of each batch of some epochs, and the labels."""
    samples = tf.data.Dataset.range(43)
    pairs = tf.data.Dataset.zip(samples, samples.map(lambda i: 100 + i))
    batches = [(x.numpy(), y.numpy()) for x, y in multi_worker_jax.batches(pairs, 12, epochs)]
    return np.array(batches)[:, 0], np.array(batches)[:, 1]


def test_an_epoch_shows_samples_once_and_in_its_own_order():
    x, y = batches_of(range(3))
    assert x.shape == (9, 12)
    np.testing.assert_array_equal(y, x + 100)
    epochs = x.reshape(3, 36)
    for epoch in epochs:
        assert len(set(epoch)) == 36
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_job_gets_the_batches_that_are_left(done):
    np.testing.assert_array_equal(
        batches_of(range(done, 3)), np.array(batches_of(range(3)))[:, 3 * done :]
    )


def test_other_backends_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(SystemExit):
        multi_worker_jax.main(["--quick"])
    assert "set KERAS_BACKEND=jax" in capsys.readouterr().err
