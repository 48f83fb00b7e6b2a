"""Tests of a disk that fills up: writing to it ends, and nothing else does."""

import errno
import json
import threading
import warnings

import keras
import numpy as np
import pytest

from full_disk_training import MOST_BYTES, UPDATES, history_of_training
from keras_sngm import SNGM, GradientNormLogger
from keras_sngm.monitoring.sinks import FileSink, TensorBoardSink
from processes import SUPPORT, run_python
from selection import whole

X = np.ones((10, 3), "float32")
FILES = {"log.csv": FileSink, "log.jsonl": FileSink, "logs": TensorBoardSink}


def build_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(SNGM(), "mse")
    return model


def fit(*callbacks, model=None):
    """Train for two epochs of ten updates each; return the `History`."""
    return (model or build_model()).fit(
        X, X[:, :1], 1, 2, callbacks=list(callbacks), shuffle=False, verbose=0
    )


def logger_of(folder, name, **arguments):
    """Return a logger of `name` in a folder: a TensorBoard directory if "logs", else a file."""
    argument = "log_dir" if name == "logs" else "filename"
    return GradientNormLogger(**{argument: folder / name}, **arguments)


def full(*arguments):
    """Raise the error of a full disk; stands in for methods that write."""
    raise OSError(errno.ENOSPC, "No space left on device")


def messages_of(caught):
    """Return the caught warnings about files that are no longer written."""
    return [str(w.message) for w in caught if "no longer written" in str(w.message)]


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """Train in a process whose files cannot grow beyond a limit, as on a full disk.

    Returns:
        The folder of the files, the history of the training, and its warnings.
    """
    folder = tmp_path_factory.mktemp("limited")
    printed = run_python(SUPPORT / "full_disk_training.py", folder)
    return folder, *json.loads(printed.splitlines()[-1])


def test_training_and_epoch_logs_go_on(limited, tmp_path):
    _, history, _ = limited
    expected = history_of_training(tmp_path)
    assert set(history) == set(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(history[key], values, rtol=1e-6, err_msg=key)


def test_each_full_file_is_told_once(limited):
    folder, _, messages = limited
    assert len(messages) == 3
    for name in FILES:
        (message,) = [m for m in messages if f"{folder / name} is no longer written" in m]
        assert "while training and the logs of epochs go on" in message
        assert "File too large" in message


def test_what_fits_is_written(limited):
    folder, _, _ = limited
    for name in ("log.csv", "log.jsonl"):
        assert (folder / name).stat().st_size == MOST_BYTES
    lines = (folder / "log.jsonl").read_text().splitlines()[:-1]
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    steps = [line.partition(",")[0] for line in (folder / "short.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(50, UPDATES + 1, 50))]


def test_a_file_that_was_full_can_be_gone_on_with(limited):
    """With `append=True` a logger continues a file after its line that was cut off."""
    folder, _, _ = limited
    for name in ("log.csv", "log.jsonl"):
        before = (folder / name).read_text().splitlines()
        fit(logger_of(folder, name, append=True, update_ratio=name == "log.csv"))
        lines = (folder / name).read_text().splitlines()
        assert lines[: len(before)] == before
        steps = [line.partition(",")[0].rpartition(" ")[2] for line in lines[len(before) :]]
        assert steps == list(map(str, range(1, 21)))


@whole
@pytest.mark.parametrize("method", ["write", "flush", "close"])
@pytest.mark.parametrize("name", FILES)
def test_other_files_are_written_to_their_end(tmp_path, monkeypatch, name, method):
    other = "log.jsonl" if name == "log.csv" else "log.csv"
    expected = fit(logger_of(tmp_path / "whole", other)).history
    loggers = [logger_of(tmp_path, name), logger_of(tmp_path, other)]
    path = str(tmp_path / name)
    usual = getattr(FILES[name], method)

    def act(sink, *arguments):
        return (full if name == "logs" or sink._name == path else usual)(sink, *arguments)

    monkeypatch.setattr(FILES[name], method, act)
    with pytest.warns(UserWarning, match="no longer written") as caught:
        history = fit(*loggers).history
    (message,) = messages_of(caught)
    assert path in message
    assert "No space left on device" in message
    assert history == expected
    assert (tmp_path / other).read_text() == (tmp_path / "whole" / other).read_text()


def test_a_full_disk_is_told_in_the_training_thread_and_while_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_sngm.monitoring.sinks.FileSink.write", full)
    told = []

    def note(message, stacklevel):
        told.append((threading.get_ident(), keras_is_training))

    keras_is_training = True

    class EndOfTraining(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            nonlocal keras_is_training
            keras_is_training = False

    monkeypatch.setattr("keras_sngm.monitoring.resilient_sink.warnings.warn", note)
    fit(EndOfTraining(), logger_of(tmp_path, "log.csv"))
    assert told == [(threading.get_ident(), True)]


def test_what_is_full_in_the_beginning_fails_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.EventFileWriter.flush", full)
    with pytest.raises(OSError, match="`log_dir` cannot be written"):
        fit(logger_of(tmp_path, "logs"))


class Compile(keras.callbacks.Callback):
    """Callback that calls a function and compiles the model anew as the second epoch begins."""

    def __init__(self, before):
        super().__init__()
        self.before = before

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.before()
            self.model.compile(SNGM(), "mse")
            self.model.optimizer.build(self.model.trainable_variables)
            self.model.make_train_function()


@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_is_full_when_a_model_is_compiled_anew(tmp_path, monkeypatch, name):
    model = build_model()
    compile_anew = Compile(lambda: monkeypatch.setattr(FILES[name], "__init__", full))
    with pytest.warns(UserWarning, match="no longer written") as caught:
        history = fit(compile_anew, logger_of(tmp_path, name), model=model).history
    assert len(messages_of(caught)) == 1
    assert np.isfinite(history["grad_norm"]).all()


def test_a_file_is_closed_whatever_goes_wrong(tmp_path, monkeypatch):
    """A file is closed once even if writing and closing fail, so that no descriptor leaks."""
    closed = []

    def close(self):
        closed.append(self)
        full()

    monkeypatch.setattr("keras_sngm.monitoring.sinks.FileSink.write", full)
    monkeypatch.setattr("keras_sngm.monitoring.sinks.FileSink.close", close)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(logger_of(tmp_path, "log.csv"))
    assert len(closed) == len(messages_of(caught)) == 1
