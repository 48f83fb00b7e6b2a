"""Tests of GradientNormLogger in `fit`: its arguments, its files, and what it must not change.

`test_logged_values.py` tests that the logged values are right.
"""

import csv
import itertools
import json
import sys
import threading
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile
from tensorboard.util.tensor_util import make_ndarray

from autodiff import CustomModel, gradients_of
from keras_sngm import SNGM, GradientNormLogger
from keras_sngm.backend.common.recorder import attached_recorders
from keras_sngm.monitoring.sinks import tensorboard_parts
from problems import BACKEND, values_of
from selection import quick_only, whole

X = np.random.default_rng(0).standard_normal((40, 6)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))
BATCH = 8

OPTIMIZERS = {
    "SNGM": SNGM,
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "Adam": keras.optimizers.Adam,
    "SNGM, loss scaled": lambda: keras.optimizers.LossScaleOptimizer(SNGM()),
    "SGD, loss scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05)),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
every_optimizer_in_whole_run = pytest.mark.parametrize(
    "make", quick_only(OPTIMIZERS.values(), [SNGM]), ids=OPTIMIZERS
)

# Not every backend of Keras has these arguments of `compile`.
SEVERAL_STEPS = [] if BACKEND == "torch" else [{"steps_per_execution": 2}]
XLA = [] if BACKEND == "torch" else [{"jit_compile": True}]


def build_model(optimizer=None, **kwargs):
    """Return a compiled model with the layers `hidden` and `head`, the same at every call."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,), name="input"),
            keras.layers.Dense(5, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="head"),
        ],
        name="net",
    )
    model.compile(optimizer=optimizer or SNGM(), loss="mse", **kwargs)
    return model


def fit(model, *callbacks, x=X, epochs=2, **kwargs):
    return model.fit(
        x, Y, BATCH, epochs, callbacks=list(callbacks), shuffle=False, verbose=0, **kwargs
    )


def norms_from_scratch(epochs=2):
    """Train a new model with the defaults; return its gradient norms, computed apart from training.

    Returns:
        An array with one row per epoch and one column per batch.
    """
    model = build_model()
    norms = []
    for _ in range(epochs):
        for i in range(0, len(X), BATCH):
            x, y = X[i : i + BATCH], Y[i : i + BATCH]
            gradients = map(ops.convert_to_numpy, gradients_of(model, x, y))
            norms.append(np.sqrt(sum(np.sum(g.astype("float64") ** 2) for g in gradients)))
            model.train_on_batch(x, y)
    return np.reshape(norms, (epochs, -1))


def lines_of(path):
    """Return the lines of a JSON lines file as dictionaries, by step; each step must occur once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line.pop("step") for line in lines]
    assert len(set(steps)) == len(steps)
    return dict(zip(steps, lines))


def scalars_in(log_dir):
    """Return the steps and the values of `grad_norm` in a folder of TensorBoard, as two lists."""
    events = EventAccumulator(str(log_dir), size_guidance={"tensors": 0}).Reload()
    # TensorBoard reads files of the same second in any order.
    data = sorted(events.Tensors("grad_norm"), key=lambda event: event.step)
    return [e.step for e in data], [float(make_ndarray(e.tensor_proto)) for e in data]


# Logged values.


def test_epoch_logs_hold_mean_and_extremes():
    norms = norms_from_scratch()
    history = fit(build_model(), GradientNormLogger()).history
    assert set(history) == {"loss", "grad_norm", "grad_norm_max", "grad_norm_min"}
    np.testing.assert_allclose(history["grad_norm"], norms.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(history["grad_norm_max"], norms.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(history["grad_norm_min"], norms.min(axis=1), rtol=1e-5)


def test_batch_logs_hold_the_norm_of_each_batch():
    kept = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kept.append(logs["grad_norm"])
    )
    fit(build_model(), GradientNormLogger(), record)
    np.testing.assert_allclose([float(n) for n in kept], norms_from_scratch().ravel(), rtol=1e-5)


def test_tensorboard_gets_one_scalar_per_step(tmp_path):
    fit(build_model(), GradientNormLogger(log_dir=tmp_path))
    steps, values = scalars_in(tmp_path)
    assert steps == list(range(1, 11))
    np.testing.assert_allclose(values, norms_from_scratch().ravel(), rtol=1e-5)


def test_tensorboard_needs_no_tensorflow(tmp_path, monkeypatch):
    """The file system of TensorBoard alone, which can do less than TensorFlow's, is sufficient."""
    parts = tensorboard_parts()
    parts.gfile = gfile
    monkeypatch.setattr("keras_sngm.monitoring.sinks.tensorboard_parts", lambda: parts)
    fit(build_model(), GradientNormLogger(log_dir=tmp_path))
    assert scalars_in(tmp_path)[0] == list(range(1, 11))
    assert not list(tmp_path.glob(".probe*"))


def test_csv_and_json_lines_hold_the_same(tmp_path):
    logger = [
        GradientNormLogger(filename=tmp_path / "folder" / f"log.{suffix}", per_variable=True)
        for suffix in ("csv", "jsonl")
    ]
    fit(build_model(), *logger)
    with open(tmp_path / "folder" / "log.csv") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    lines = lines_of(tmp_path / "folder" / "log.jsonl")
    assert list(rows) == list(lines) == list(range(1, 11))
    for step, row in rows.items():
        assert {key: float(value) for key, value in row.items()} == lines[step]


def test_log_every(tmp_path):
    logger = GradientNormLogger(tmp_path, tmp_path / "log.jsonl", log_every=4, update_ratio=True)
    history = fit(build_model(), logger, epochs=3).history
    assert list(lines_of(tmp_path / "log.jsonl")) == scalars_in(tmp_path)[0] == [4, 8, 12]
    norms = norms_from_scratch(3)
    np.testing.assert_allclose(history["grad_norm"], norms.mean(axis=1), rtol=1e-5)


def test_epochs_without_a_logged_step_say_so():
    history = fit(build_model(), GradientNormLogger(log_every=8, update_ratio=True)).history
    assert np.isnan(history["update_ratio"][0])
    assert history["update_ratio"][1] > 0


@pytest.mark.parametrize(
    "per_variable, groups",
    [
        (True, ["net/hidden/kernel", "net/hidden/bias", "net/head/kernel", "net/head/bias"]),
        (1, ["net"]),
        (2, ["net/hidden", "net/head"]),
        (9, ["net/hidden/kernel", "net/hidden/bias", "net/head/kernel", "net/head/bias"]),
        (lambda v: "kernel" in v.path, ["net/hidden/kernel", "net/head/kernel"]),
    ],
)
def test_groups_of_variables(tmp_path, per_variable, groups):
    model = build_model(keras.optimizers.SGD(0.0))
    model.layers[0].name = "hidden"
    logger = GradientNormLogger(
        filename=tmp_path / "log.jsonl", per_variable=per_variable, update_ratio=True
    )
    history = fit(model, logger, GradientNormLogger(per_variable=True), epochs=1).history
    line = lines_of(tmp_path / "log.jsonl")[1]
    endings = ["", *(f"/{group}" for group in groups)]
    names = ("grad_norm", "update_ratio", "update_norm", "weight_norm")
    assert set(line) == {name + ending for ending in endings for name in names}
    for group in groups:
        members = [v.path for v in model.trainable_variables if v.path.startswith(group)]
        squares = sum(history[f"grad_norm/{path}"][0] ** 2 for path in members)
        if len(members) == 1:
            assert history[f"grad_norm/{group}"][0] == pytest.approx(np.sqrt(squares))
    assert history["grad_norm/net/head/kernel"][0] > 0


def test_variables_of_the_same_path_are_told_apart(tmp_path):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(1, name="a"), keras.layers.Dense(1, name="b")]
    )
    for layer in model.layers:
        layer.kernel._path = "same"
    model.compile(SNGM(), "mse")
    history = fit(model, GradientNormLogger(per_variable=True)).history
    assert {"grad_norm/same", "grad_norm/same_1"} <= set(history)


def test_histograms_of_chosen_variables(tmp_path):
    logger = GradientNormLogger(
        tmp_path, histogram_every=5, per_variable=lambda v: "kernel" in v.path
    )
    fit(build_model(), logger)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]
    assert {tag for tag in tags if not tag.startswith("grad_norm")} == {
        f"{kind}/net/{layer}/kernel"
        for kind in ("gradients", "momenta")
        for layer in ("hidden", "head")
    }


class WithoutElements(keras.layers.Dense):
    """Dense layer with one more weight, which has no elements."""

    def build(self, input_shape):
        super().build(input_shape)
        self.nothing = self.add_weight(shape=(0, 3), name="nothing")

    def call(self, inputs):
        return super().call(inputs) + ops.sum(self.nothing)


@pytest.mark.parametrize("make", [SNGM, OPTIMIZERS["SGD"]], ids=["SNGM", "SGD"])
def test_a_variable_may_be_without_elements(tmp_path, make):
    model = keras.Sequential([keras.Input((6,)), WithoutElements(1, name="head")], name="net")
    model.compile(make(), "mse")
    logger = GradientNormLogger(
        tmp_path, per_variable=True, update_ratio=True, histogram_every=2, on_nonfinite="stop"
    )
    history = fit(model, logger).history
    assert history["grad_norm/net/head/nothing"] == [0.0, 0.0]
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    histograms = events.Tensors("gradients/net/head/kernel")
    assert [event.step for event in histograms] == [2, 4, 6, 8, 10]


def test_other_callbacks_see_the_norm(tmp_path, capsys):
    model = build_model()
    model.fit(
        X,
        Y,
        BATCH,
        verbose=1,
        callbacks=[
            GradientNormLogger(),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TensorBoard(tmp_path / "tensorboard"),
            keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "grad_norm", mode="min"),
        ],
    )
    assert "grad_norm: " in capsys.readouterr().out
    with open(tmp_path / "log.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["grad_norm"]) > 0
    assert float(row["grad_norm_max"]) >= float(row["grad_norm"]) >= float(row["grad_norm_min"])
    assert (tmp_path / "best.keras").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard/train")).Reload()
    assert "epoch_grad_norm" in events.Tags()["tensors"]


# Ways of training.


if SEVERAL_STEPS:

    @every_optimizer_in_whole_run
    def test_steps_within_an_execution_count(tmp_path, make):
        lines, histories = [], []
        for steps in (1, 3):
            filename = tmp_path / f"{steps}.jsonl"
            logger = GradientNormLogger(filename=filename, per_variable=True)
            model = build_model(make(), steps_per_execution=steps)
            histories.append(fit(model, logger).history)
            lines.append(lines_of(filename))
        assert list(lines[0]) == list(lines[1]) == list(range(1, 11))
        for step in lines[0]:
            assert lines[1][step] == pytest.approx(lines[0][step], rel=1e-5)
        assert histories[1]["grad_norm_max"] == pytest.approx(
            histories[0]["grad_norm_max"], rel=1e-5
        )


def test_more_updates_than_are_kept_at_once(tmp_path, monkeypatch):
    """All updates are logged even if the ring buffers on the device hold only two of them.

    Histograms of many variables leave room for few updates.
    """
    monkeypatch.setattr("keras_sngm.monitoring.callback._MOST_UPDATES", 2)
    logger = GradientNormLogger(
        tmp_path, tmp_path / "log.jsonl", update_ratio=True, histogram_every=3
    )
    history = fit(build_model(), logger, epochs=7).history
    norms = norms_from_scratch(7)
    np.testing.assert_allclose(history["grad_norm"], norms.mean(axis=1), rtol=1e-5)
    assert list(lines_of(tmp_path / "log.jsonl")) == list(range(1, 36))
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    histograms = events.Tensors("gradients/net/hidden/kernel")
    assert [event.step for event in histograms] == list(range(3, 36, 3))


class SeveralUpdates(CustomModel):
    """Model whose training step makes one update for each column of the targets."""

    several = True


def model_of_several_updates(optimizer):
    """Return a compiled `SeveralUpdates` with one dense layer, the same at every call."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    model = SeveralUpdates(inputs, keras.layers.Dense(1)(inputs))
    model.compile(optimizer, "mse")
    return model


@whole
@every_optimizer
def test_a_training_step_may_make_several_updates(tmp_path, make, monkeypatch):
    monkeypatch.setattr("keras_sngm.monitoring.callback._MOST_UPDATES", 24)
    x, y = np.tile(X, (10, 1)), np.tile(Y, (10, 8))
    logger = GradientNormLogger(filename=tmp_path / "log.jsonl")
    model_of_several_updates(make()).fit(x, y, BATCH, verbose=0, callbacks=[logger])
    assert list(lines_of(tmp_path / "log.jsonl")) == list(range(1, 8 * 50 + 1))


@whole
@pytest.mark.parametrize("make", [SNGM, OPTIMIZERS["SGD"]], ids=["SNGM", "SGD"])
@pytest.mark.parametrize("batches", [3, 6])
def test_stopping_amid_a_training_step(make, batches):
    """A stop takes effect within the training step of batch 3: after its first update none is made.

    The weights are the same whether batch 3 is the last one of the epoch or not.
    """
    x, y = np.tile(X, (2, 1)), np.tile(Y, (2, 4))
    good = model_of_several_updates(make())
    good.fit(x[: 2 * BATCH], y[: 2 * BATCH], BATCH, shuffle=False, verbose=0)
    good.several = False
    good.compile(good.optimizer, "mse")
    good.fit(x[2 * BATCH : 3 * BATCH], y[2 * BATCH : 3 * BATCH, :1], BATCH, verbose=0)
    y[2 * BATCH, 1] = np.nan
    model, size = model_of_several_updates(make()), batches * BATCH
    logger = GradientNormLogger(on_nonfinite="stop")
    with pytest.warns(UserWarning, match="step 10 is not finite"):
        model.fit(x[:size], y[:size], BATCH, shuffle=False, verbose=0, callbacks=[logger])
    for value, expected in zip(values_of(model.weights), values_of(good.weights)):
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_updates_that_cannot_be_kept_are_told_and_do_no_harm(monkeypatch):
    """If updates overflow the ring buffer, the logger warns of it and training goes on."""
    monkeypatch.setattr("keras_sngm.monitoring.callback._MOST_UPDATES", 4)
    model = model_of_several_updates(SNGM())
    with pytest.warns(UserWarning, match="8 updates were made .* not logged"):
        model.fit(X, np.tile(Y, 8), len(X), verbose=0, callbacks=[GradientNormLogger()])
    assert int(model.optimizer.iterations) == 8


class NoUpdate(keras.Model):
    """Model whose training step never calls `model.optimizer`, as if it used another optimizer."""

    def train_step(self, state, data=None):
        return {"loss": 0.0} if data is None else ({"loss": 0.0}, state)


def test_an_optimizer_that_makes_no_update_is_told():
    """The logger warns if `model.optimizer` makes no update."""
    inputs = keras.Input((6,))
    model = NoUpdate(inputs, keras.layers.Dense(1)(inputs))
    model.compile(SNGM(), "mse")
    with pytest.warns(UserWarning, match="has seen no update by `model.optimizer`"):
        fit(model, GradientNormLogger(on_nonfinite="stop"))


def test_several_loggers_at_once(tmp_path):
    first = GradientNormLogger(filename=tmp_path / "a.jsonl", log_every=2, update_ratio=True)
    second = GradientNormLogger(filename=tmp_path / "b.jsonl", log_every=3, per_variable=1)
    norms = norms_from_scratch().ravel()
    fit(build_model(), first, second)
    a, b = lines_of(tmp_path / "a.jsonl"), lines_of(tmp_path / "b.jsonl")
    assert list(a) == [2, 4, 6, 8, 10]
    assert list(b) == [3, 6, 9]
    assert a[6]["grad_norm"] == b[6]["grad_norm"] == pytest.approx(norms[5], rel=1e-5)
    assert "update_ratio" not in b[6]
    assert "grad_norm/net" not in a[6]


if hasattr(keras.optimizers, "MultiOptimizer"):  # Keras 3.10 does not have it.

    def test_a_multi_optimizer_is_logged_as_a_whole(tmp_path):
        halves = keras.optimizers.OptimizerMap(
            SNGM(0.05), {"net/head/.*": keras.optimizers.SGD(0.05)}
        )
        model = build_model(keras.optimizers.MultiOptimizer(halves))
        logger = GradientNormLogger(
            tmp_path,
            tmp_path / "log.jsonl",
            per_variable=True,
            update_ratio=True,
            histogram_every=5,
        )
        fit(model, logger)
        lines = lines_of(tmp_path / "log.jsonl")
        assert list(lines) == list(range(1, 11))
        assert lines[1]["grad_norm"] == pytest.approx(norms_from_scratch()[0, 0], rel=1e-5)
        paths = [v.path for v in model.trainable_variables]
        squares = sum(lines[7][f"grad_norm/{path}"] ** 2 for path in paths)
        assert lines[7]["grad_norm"] == pytest.approx(np.sqrt(squares), rel=1e-5)
        assert "momentum_norm/net/hidden/kernel" in lines[1]
        assert "momentum_norm/net/head/kernel" not in lines[1]
        tags = EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]
        assert {f"gradients/{path}" for path in paths} <= set(tags)
        assert "momenta/net/hidden/kernel" in tags
        assert "momenta/net/head/kernel" not in tags

    def test_a_multi_optimizer_with_different_updates_is_refused():
        halves = keras.optimizers.OptimizerMap(
            SNGM(0.05, gradient_accumulation_steps=2), {"net/head/.*": keras.optimizers.SGD(0.05)}
        )
        with pytest.raises(ValueError, match=r"same `gradient_accumulation_steps`.*\[None, 2\]"):
            fit(build_model(keras.optimizers.MultiOptimizer(halves)), GradientNormLogger())


class _KilledError(Exception):
    pass


def kill_in_epoch(number):
    """Return a callback that raises an error at the beginning of an epoch."""

    def act(epoch, logs):
        if epoch == number:
            raise _KilledError

    return keras.callbacks.LambdaCallback(on_epoch_begin=act)


@whole
@every_optimizer
def test_resumed_training_goes_on_counting(tmp_path, make):
    """Training that resumes from a backup continues the existing files."""

    def callbacks():
        logger = GradientNormLogger(
            tmp_path / "logs", tmp_path / "log.csv", update_ratio=True, append=True
        )
        return logger, keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(_KilledError):
        fit(build_model(make()), *callbacks(), kill_in_epoch(2), epochs=4)
    fit(build_model(make()), *callbacks(), epochs=4)
    whole = GradientNormLogger(filename=tmp_path / "whole.csv", update_ratio=True)
    fit(build_model(make()), whole, epochs=4)
    assert (tmp_path / "log.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert scalars_in(tmp_path / "logs")[0] == list(range(1, 21))


def test_one_logger_twice_is_refused_and_leaves_nothing_behind():
    model, logger = build_model(), GradientNormLogger()
    with pytest.raises(ValueError, match="once. Received: the same one twice"):
        fit(model, logger, logger)
    assert not attached_recorders(model.optimizer)
    assert np.isfinite(fit(model, logger).history["grad_norm"]).all()


def test_a_second_fit_goes_on_counting(tmp_path):
    model = build_model()
    logger = GradientNormLogger(tmp_path, tmp_path / "log.jsonl")
    fit(model, logger, epochs=1)
    fit(model, logger, epochs=1)
    steps, values = scalars_in(tmp_path)
    assert steps == list(lines_of(tmp_path / "log.jsonl")) == list(range(1, 11))
    np.testing.assert_allclose(values, norms_from_scratch().ravel(), rtol=1e-5)


def test_a_new_logger_overwrites_its_file(tmp_path):
    for _ in range(2):
        fit(build_model(), GradientNormLogger(filename=tmp_path / "log.csv"), epochs=1)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 5


def test_a_line_that_was_broken_off_spoils_no_other(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "grad_')
    fit(build_model(), GradientNormLogger(filename=tmp_path / "log.jsonl", append=True), epochs=1)
    broken, *lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert broken == '{"step": 1, "grad_'
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("there", ["", "st", "step,grad_norm"])
def test_a_header_that_was_broken_off_is_written_anew(tmp_path, there):
    (tmp_path / "log.csv").write_text(there)
    fit(build_model(), GradientNormLogger(filename=tmp_path / "log.csv", append=True), epochs=1)
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert header == "step,grad_norm"
    assert len(lines) == 5


def test_an_interrupted_epoch_is_written_and_leaves_nothing_behind(tmp_path):
    def interrupt(batch, logs):
        if batch == 2:
            raise KeyboardInterrupt

    logger = GradientNormLogger(filename=tmp_path / "log.jsonl")
    model = build_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, logger, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt))
    history = fit(build_model(), logger).history
    assert list(lines_of(tmp_path / "log.jsonl")) == [1, 2, 3]
    np.testing.assert_allclose(history["grad_norm"], norms_from_scratch().mean(axis=1), rtol=1e-5)
    assert list(lines_of(tmp_path / "log_1.jsonl")) == list(range(1, 11))


def test_a_logger_outlives_an_interruption_and_other_training(monkeypatch):
    """A logger whose `fit` was interrupted can be used again, with a warning about lost updates.

    In between, more updates are made without the logger than its ring buffer can hold.
    """
    monkeypatch.setattr("keras_sngm.monitoring.callback._MOST_UPDATES", 4)
    logger, model = GradientNormLogger(), build_model()

    def interrupt(batch, logs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, logger, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt))
    fit(model, epochs=2)
    with pytest.warns(UserWarning, match="updates were made .* not logged"):
        history = fit(model, logger).history
    assert np.isfinite(history["grad_norm"]).all()


@whole
@every_optimizer
def test_an_interrupted_logger_does_not_go_on_beside_the_next(make):
    def interrupt(batch, logs):
        raise KeyboardInterrupt

    model, first = build_model(make()), GradientNormLogger(per_variable=True)
    fit(model, epochs=1)
    count = len(model.optimizer.variables)
    with pytest.raises(KeyboardInterrupt):
        fit(model, first, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt))
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    recorders = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: recorders.extend(attached_recorders(inner))
    )
    fit(model, GradientNormLogger(), GradientNormLogger(), look, epochs=1)
    assert [recorder.plan.per_variable for recorder in recorders] == [False, False]
    assert len(model.optimizer.variables) == count
    assert np.isfinite(fit(model, first).history["grad_norm"]).all()
    assert not attached_recorders(inner)


def counted_traces(model):
    """Wrap the training step of a model; return a list that grows with each trace of the step."""
    traces = []
    step = model.train_step

    def train_step(*arguments):
        traces.append(1)
        return step(*arguments)

    model.train_step = train_step
    return traces


if BACKEND != "torch":  # PyTorch does not trace.

    @every_optimizer_in_whole_run
    def test_only_a_first_logger_costs_a_trace(make, tmp_path):
        """The training step is traced once for all loggers with the same arguments, not for each.

        On JAX each change of the set of loggers costs a trace, as they are part of the traced
        state.
        """
        model = build_model(make())
        model.optimizer.build(model.trainable_variables)
        traces = counted_traces(model)
        counts = []
        for loggers in (
            [GradientNormLogger(filename=tmp_path / "a" / "log.csv", update_ratio=True)],
            [GradientNormLogger(filename=tmp_path / "b" / "log.csv", update_ratio=True)],
            [GradientNormLogger(filename=tmp_path / "c" / "log.csv", update_ratio=True)],
            [],
            [GradientNormLogger(per_variable=True), GradientNormLogger()],
            [GradientNormLogger(), GradientNormLogger(per_variable=True)],
            [GradientNormLogger(per_variable=True)],
        ):
            fit(model, *loggers)
            counts.append(len(traces))
        expected = {"tensorflow": [1, 1, 1, 1, 2, 2, 2], "jax": [1, 1, 1, 2, 3, 4, 5]}
        assert counts == expected[BACKEND]


@whole
@every_optimizer
def test_what_was_traced_without_a_logger_is_traced_again(make, tmp_path):
    """A step traced without a logger, for another batch shape, is traced again with a logger."""
    model = build_model(make())
    fit(model, GradientNormLogger())
    model.fit(X, Y, 5, verbose=0)
    logger = GradientNormLogger(filename=tmp_path / "log.csv")
    history = model.fit(X, Y, 5, verbose=0, callbacks=[logger]).history
    assert history["grad_norm_min"][0] > 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + len(X) // 5


@every_optimizer_in_whole_run
@pytest.mark.parametrize("kwargs", [{}, {"run_eagerly": True}, *XLA])
def test_training_is_not_changed(tmp_path, make, kwargs):
    plain, logged = build_model(make(), **kwargs), build_model(make(), **kwargs)
    logger = GradientNormLogger(
        tmp_path, per_variable=True, update_ratio=True, histogram_every=2, on_nonfinite="stop"
    )
    fit(plain)
    fit(logged, logger)
    fit(plain)
    fit(logged)
    tolerance = 1e-6 if kwargs == {"jit_compile": True} else 0.0
    for value, other in zip(
        values_of([*logged.weights, *logged.optimizer.variables]),
        values_of([*plain.weights, *plain.optimizer.variables]),
        strict=True,
    ):
        np.testing.assert_allclose(value, other, rtol=tolerance, atol=tolerance)
    assert "apply" not in vars(logged.optimizer)


def tensor_class_and_ways_to_wait():
    """Return the backend's class of tensors, and the functions that wait for a tensor's value.

    Each function is given by its owner and its name.
    """
    tensor = type(ops.convert_to_tensor(0.0))
    if BACKEND == "tensorflow":
        tensor = tensor.__mro__[1]
        return tensor, [(tensor, "_numpy")]
    names = ["__array__", "__bool__", "__float__", "__int__", "item", "tolist"]
    if BACKEND == "torch":
        return tensor, [(tensor, name) for name in [*names, "cpu", "numpy"]]
    # NumPy reads a JAX array without calling a method of the array.
    return tensor, [
        (np, "array"),
        (np, "asarray"),
        *((tensor, name) for name in [*names, "block_until_ready"]),
    ]


def waits_in_an_epoch(*callbacks):
    """Train with callbacks; count how often the training thread reads, and so awaits, a tensor."""
    count = 0
    tensor, ways = tensor_class_and_ways_to_wait()
    training = threading.get_ident()
    model = build_model()
    fit(model, *callbacks, epochs=1)  # This epoch traces, which reads values, too.

    def counting(function):
        def counted(value, *arguments, **options):
            nonlocal count
            count += isinstance(value, tensor) and threading.get_ident() == training
            return function(value, *arguments, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:

        def begin_to_count(epoch, logs):
            for owner, name in ways:
                patch.setattr(owner, name, counting(getattr(owner, name)))

        begin = keras.callbacks.LambdaCallback(on_epoch_begin=begin_to_count)
        end = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: patch.undo())
        fit(model, end, *callbacks, begin, epochs=1)
    return count


@pytest.mark.parametrize("on_nonfinite", quick_only(["warn", "stop", "ignore"], quick=["stop"]))
def test_training_never_waits_inside_an_epoch(tmp_path, monkeypatch, on_nonfinite):
    """The training thread does not wait even if the reader thread reads after every step."""
    monkeypatch.setattr("keras_sngm.monitoring.recording._SECONDS_BETWEEN_READS", 0.0)
    logger = GradientNormLogger(
        tmp_path,
        tmp_path / "log.csv",
        per_variable=True,
        update_ratio=True,
        histogram_every=2,
        on_nonfinite=on_nonfinite,
    )
    waits = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: float(logs["grad_norm"])
    )
    without = waits_in_an_epoch()
    assert waits_in_an_epoch(logger) == without
    assert waits_in_an_epoch(GradientNormLogger(), waits) >= without + len(X) // BATCH


# Gradients that are not finite.


def with_nan(*samples):
    """Return a copy of `X` in which the given samples are NaN."""
    x = X.copy()
    x[list(samples)] = np.nan
    return x


def test_skipped_steps_show_in_the_logs():
    model = build_model()
    history = fit(model, GradientNormLogger(on_nonfinite="ignore"), x=with_nan(3)).history
    assert np.isnan(history["grad_norm"]).all()
    assert int(model.optimizer.skipped_steps) == 2


def test_the_first_fault_is_told_once():
    logger = GradientNormLogger()
    with pytest.warns(UserWarning, match="step 2 is not finite") as caught:
        fit(build_model(), logger, x=with_nan(9, 17, 30))
    (warning,) = [w for w in caught if "not finite" in str(w.message)]
    assert "net/hidden/kernel" in str(warning.message)
    assert "Training stops" not in str(warning.message)


def test_the_variables_at_fault_are_named():
    """The warning does not name the last layer, whose gradient is finite."""

    class Broken(keras.layers.Layer):
        def call(self, x):
            return x + ops.stop_gradient(x) * ops.sqrt(0.0 * x)  # The derivative is NaN.

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="first"),
            Broken(),
            keras.layers.Dense(1, name="last"),
        ],
        name="net",
    )
    model.compile(SNGM(), "mse")
    with pytest.warns(UserWarning, match="not finite") as caught:
        fit(model, GradientNormLogger(), epochs=1)
    message = next(str(w.message) for w in caught if "not finite" in str(w.message))
    assert "Variables: net/first/kernel, net/first/bias." in message


def test_faults_can_be_ignored():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(build_model(), GradientNormLogger(on_nonfinite="ignore"), x=with_nan(3))


@every_optimizer_in_whole_run
@pytest.mark.parametrize("kwargs", [{}, {"run_eagerly": True}, *SEVERAL_STEPS])
def test_stopping_leaves_the_last_good_model(tmp_path, make, kwargs):
    """A stop leaves the weights as before the bad step, however late the host notices the step.

    The bad step is the last one to be logged.
    """
    good = build_model(make(), **kwargs)
    good.fit(X[:16], Y[:16], BATCH, verbose=0, shuffle=False)
    model = build_model(make(), **kwargs)
    logger = GradientNormLogger(filename=tmp_path / "log.jsonl", on_nonfinite="stop")
    if "loss scaled" in model.optimizer.name or hasattr(model.optimizer, "inner_optimizer"):
        # A step that a LossScaleOptimizer skips is no reason to stop.
        history = fit(model, logger, x=with_nan(17)).history
        assert len(history["loss"]) == 2
        return
    with pytest.warns(UserWarning, match="step 3 is not finite.*as it was before that step"):
        history = fit(model, logger, x=with_nan(17), epochs=5).history
    assert len(history["loss"]) == 1
    assert list(lines_of(tmp_path / "log.jsonl")) == [1, 2, 3]
    for value, expected in zip(values_of(model.weights), values_of(good.weights)):
        np.testing.assert_array_equal(value, expected)
    assert history["grad_norm_max"][0] != pytest.approx(history["grad_norm"][0])
    # The next `fit` trains the model again.
    fit(model, epochs=1)
    assert not np.array_equal(values_of(model.weights)[0], values_of(good.weights)[0])


def model_with_statistics(optimizer):
    """Return a compiled model with batch normalization, the same at every call."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile(optimizer, "mse")
    return model


@pytest.mark.parametrize("make", [SNGM, lambda: keras.optimizers.SGD(0.05)])
def test_stopping_leaves_batch_statistics_and_validation_alone(make):
    good, model = model_with_statistics(make()), model_with_statistics(make())
    good.fit(X[:16], Y[:16], BATCH, verbose=0, shuffle=False)
    with pytest.warns(UserWarning, match="step 3"):
        history = fit(
            model,
            GradientNormLogger(on_nonfinite="stop"),
            x=with_nan(17),
            epochs=5,
            validation_data=(X, Y),
        ).history
    for value, expected in zip(values_of(model.weights), values_of(good.weights)):
        np.testing.assert_array_equal(value, expected)
    assert np.isfinite(history["val_loss"]).all()


def test_stopping_with_accumulation():
    for make in (SNGM, lambda **k: keras.optimizers.SGD(0.05, **k)):
        good = build_model(make(gradient_accumulation_steps=2))
        good.fit(X[:16], Y[:16], BATCH, verbose=0, shuffle=False)
        # The first sample is in the first micro-batch of the update, the other in the second.
        for sample in (17, 25):
            model = build_model(make(gradient_accumulation_steps=2))
            with pytest.warns(UserWarning, match="step 2 is not finite"):
                fit(model, GradientNormLogger(on_nonfinite="stop"), x=with_nan(sample), epochs=4)
            for value, expected in zip(values_of(model.weights), values_of(good.weights)):
                np.testing.assert_array_equal(value, expected)


def test_stopping_does_not_wait_for_the_end_of_the_epoch(monkeypatch):
    monkeypatch.setattr("keras_sngm.monitoring.recording._SECONDS_BETWEEN_READS", 0.0)
    batches = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batches.append(batch)
    )
    x = ((with_nan(3)[:BATCH], Y[:BATCH]) for _ in itertools.count())
    with pytest.warns(UserWarning, match="step 1 is not finite"):
        build_model().fit(
            x,
            steps_per_epoch=100_000,
            verbose=0,
            callbacks=[GradientNormLogger(on_nonfinite="stop"), count],
        )
    assert len(batches) < 20_000


@every_optimizer
def test_an_interrupted_stop_does_not_hold_what_is_trained_next(make):
    """If a `fit` is interrupted after its logger has stopped the steps, the next `fit` trains.

    The next `fit` uses the same compiled function, and the logger's `on_train_end` was never
    called.
    """

    def interrupt(batch, logs):
        if batch == 3:
            raise KeyboardInterrupt

    model = build_model(make())
    model.optimizer.build(model.trainable_variables)
    traces = counted_traces(model)
    logger = GradientNormLogger(on_nonfinite="stop")
    by_hand = keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(model, logger, by_hand, x=with_nan(17))
    before = values_of(model.weights)
    fit(model, epochs=1)
    if BACKEND != "torch":
        assert len(traces) == 1
    assert not np.array_equal(values_of(model.weights)[0], before[0])


def test_batch_statistics_that_were_restored_before_are_the_last_good_ones(tmp_path):
    """A stop in the first resumed step keeps the batch statistics that BackupAndRestore restored.

    The logger is called before BackupAndRestore.
    """

    def callbacks():
        return (
            GradientNormLogger(on_nonfinite="stop"),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        )

    good = model_with_statistics(SNGM())
    with pytest.raises(_KilledError):
        fit(good, *callbacks(), kill_in_epoch(1))
    model = model_with_statistics(SNGM())
    with pytest.warns(UserWarning, match="step 6"):
        fit(model, *callbacks(), x=with_nan(0))
    for value, expected in zip(values_of(model.weights), values_of(good.weights)):
        np.testing.assert_array_equal(value, expected)


# Bad arguments, and errors.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"log_every": 0}, r"`log_every` must be an integer >= 1.*log_every=0"),
        ({"log_every": True}, r"`log_every` must be an integer >= 1.*log_every=True"),
        ({"log_every": 2.0}, r"`log_every` must be an integer >= 1.*log_every=2.0"),
        ({"per_variable": 0}, r"`per_variable` must be.*per_variable=0"),
        ({"per_variable": -1}, r"`per_variable` must be.*per_variable=-1"),
        ({"per_variable": "kernel"}, r"`per_variable` must be.*per_variable=kernel"),
        ({"per_variable": None}, r"`per_variable` must be.*per_variable=None"),
        ({"histogram_every": 0, "log_dir": "x"}, r"`histogram_every` must be.*=0"),
        ({"histogram_every": 2}, r"`histogram_every` needs `log_dir`.*histogram_every=2"),
        ({"on_nonfinite": "raise"}, r'`on_nonfinite` must be "warn".*on_nonfinite=raise'),
        ({"filename": "log.txt"}, r"`filename` must end in .csv or .jsonl.*filename=log.txt"),
        ({"update_ratio": 10}, r"`update_ratio` must be a boolean.*update_ratio=10"),
        ({"append": "yes"}, r"`append` must be a boolean.*append=yes"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientNormLogger(**arguments)


@pytest.mark.parametrize("argument", ["log_dir", "filename"])
def test_what_cannot_be_written_fails_before_training(tmp_path, argument):
    (tmp_path / "file").write_text("")
    begun = []
    witness = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    logger = GradientNormLogger(**{argument: tmp_path / "file" / "log.csv"})
    model = build_model(keras.optimizers.SGD())
    with pytest.raises(OSError, match=f"`{argument}` cannot be written.*file/log.csv"):
        fit(model, logger, witness)
    assert not begun
    assert "apply" not in vars(model.optimizer)


def test_a_file_with_other_columns_is_not_appended_to(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    logger = GradientNormLogger(filename=tmp_path / "log.csv", append=True)
    with pytest.raises(ValueError, match="columns step, grad_norm. Received.*step, loss"):
        fit(build_model(), logger)
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,2\n"


def test_what_goes_wrong_in_the_thread_is_raised(monkeypatch):
    def wrong(self, rows):
        raise ValueError("a fault of ours")

    logger = GradientNormLogger()
    begin = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: monkeypatch.setattr(
            "keras_sngm.monitoring.values.LoggedValues.of_updates", wrong
        )
    )
    with pytest.raises(ValueError, match="a fault of ours"):
        fit(build_model(), logger, begin)


@pytest.mark.parametrize("make", [SNGM, keras.optimizers.SGD])
def test_what_goes_wrong_at_the_end_leaves_nothing_behind(tmp_path, monkeypatch, make):
    def wrong(self):
        raise ValueError("a fault of ours")

    closed = []
    monkeypatch.setattr("keras_sngm.monitoring.recording.Recording.close", wrong)
    for sink in ("FileSink", "TensorBoardSink"):
        monkeypatch.setattr(
            f"keras_sngm.monitoring.sinks.{sink}.close", lambda self: closed.append(1)
        )
    model = build_model(make())
    with pytest.raises(ValueError, match="a fault of ours"):
        fit(model, GradientNormLogger(tmp_path, tmp_path / "log.csv"))
    assert len(closed) == 2
    assert not attached_recorders(model.optimizer)
    assert "apply" not in vars(model.optimizer)


def test_a_model_without_optimizer_is_refused():
    model = build_model()
    logger = GradientNormLogger()
    logger.set_model(model)
    model.optimizer = None
    with pytest.raises(ValueError, match=r"needs a model compiled with.*model.optimizer=None"):
        logger.on_train_begin()


def test_tensorboard_is_asked_for_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        GradientNormLogger(log_dir="logs")
    GradientNormLogger()
