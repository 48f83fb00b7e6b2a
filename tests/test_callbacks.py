"""GradientNormLogger shows what the optimizer measured."""

import csv
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_sngm import SNGM, GradientNormLogger
from problems import values_of

X = np.random.default_rng(0).standard_normal((40, 6)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))
BATCH = 8


def build_model(optimizer=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    )
    model.compile(optimizer=optimizer or SNGM(), loss="mse")
    return model


def fit(model, *callbacks, epochs=2, **kwargs):
    return model.fit(
        X, Y, BATCH, epochs, callbacks=list(callbacks), shuffle=False, verbose=0, **kwargs
    )


def norms_from_scratch(epochs=2):
    """Gradient norms of the same training, each by a GradientTape of its own."""
    model = build_model()
    norms = []
    for _ in range(epochs):
        for i in range(0, len(X), BATCH):
            x, y = X[i : i + BATCH], Y[i : i + BATCH]
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            norms.append(np.sqrt(sum(np.sum(g.numpy().astype("float64") ** 2) for g in gradients)))
            model.train_on_batch(x, y)
    return np.reshape(norms, (epochs, -1))


def scalars_in(log_dir):
    events = EventAccumulator(str(log_dir)).Reload()
    data = events.Tensors("grad_norm")
    return [e.step for e in data], [float(tf.make_ndarray(e.tensor_proto)) for e in data]


def test_epoch_logs_hold_mean_and_maximum():
    norms = norms_from_scratch()
    history = fit(build_model(), GradientNormLogger()).history
    np.testing.assert_allclose(history["grad_norm"], norms.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(history["grad_norm_max"], norms.max(axis=1), rtol=1e-5)


def test_batch_logs_hold_the_norm_of_each_batch():
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(logs["grad_norm"]))
    )
    fit(build_model(), GradientNormLogger(), record)
    np.testing.assert_allclose(seen, norms_from_scratch().ravel(), rtol=1e-5)


def test_batch_logs_are_not_overwritten_by_later_steps():
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


def test_tensorboard_goes_on_counting_in_a_second_fit(tmp_path):
    model = build_model()
    logger = GradientNormLogger(log_dir=tmp_path)
    fit(model, logger, epochs=1)
    fit(model, logger, epochs=1)
    steps, values = scalars_in(tmp_path)
    assert steps == list(range(1, 11))
    np.testing.assert_allclose(values, norms_from_scratch().ravel(), rtol=1e-5)


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
    assert float(row["grad_norm_max"]) >= float(row["grad_norm"])
    assert (tmp_path / "best.keras").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard/train")).Reload()
    assert "epoch_grad_norm" in events.Tags()["tensors"]


def test_epochs_longer_than_a_chunk(monkeypatch):
    from keras_sngm import callbacks

    monkeypatch.setattr(callbacks._DeviceSeries, "CHUNK", 2)
    history = fit(build_model(), GradientNormLogger()).history
    np.testing.assert_allclose(history["grad_norm"], norms_from_scratch().mean(axis=1), rtol=1e-5)


def fetches_in_an_epoch(*callbacks):
    """How often the host asks for the value of a tensor, and so waits for it."""
    count = 0
    tensor = type(tf.constant(0.0)).__mro__[1]
    fetch = tensor._numpy

    def counted(self):
        nonlocal count
        count += 1
        return fetch(self)

    with pytest.MonkeyPatch.context() as patch:
        begin = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: patch.setattr(tensor, "_numpy", counted)
        )
        end = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: patch.undo())
        fit(build_model(), begin, end, *callbacks, epochs=1)
    return count


def test_nothing_is_fetched_inside_an_epoch():
    """Only Keras' own loss makes the host wait for the device."""
    fetch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: float(logs["grad_norm"])
    )
    without = fetches_in_an_epoch()
    assert fetches_in_an_epoch(GradientNormLogger()) == without
    assert fetches_in_an_epoch(GradientNormLogger(), fetch) == without + len(X) / BATCH


def test_an_interrupted_epoch_leaves_nothing_behind(tmp_path):
    def interrupt(batch, logs):
        if batch == 2:
            raise KeyboardInterrupt

    logger = GradientNormLogger(log_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(build_model(), logger, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt))
    history = fit(build_model(), logger).history
    np.testing.assert_allclose(history["grad_norm"], norms_from_scratch().mean(axis=1), rtol=1e-5)


def test_training_is_not_changed():
    plain, logged = build_model(), build_model()
    fit(plain)
    fit(logged, GradientNormLogger())
    for value, other in zip(values_of(logged.weights), values_of(plain.weights), strict=True):
        np.testing.assert_array_equal(value, other)


def test_skipped_steps_show_in_the_logs():
    model = build_model()
    x = X.copy()
    x[3] = np.nan
    history = model.fit(x, Y, BATCH, 2, callbacks=[GradientNormLogger()], verbose=0).history
    assert np.isnan(history["grad_norm"]).all()
    assert int(model.optimizer.skipped_steps) == 2


def test_other_optimizers_are_refused_clearly():
    model = build_model(keras.optimizers.SGD())
    with pytest.raises(ValueError, match=r"`GradientNormLogger` needs .*SNGM.*Received.*SGD"):
        fit(model, GradientNormLogger())


def test_tensorboard_is_asked_for_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        GradientNormLogger(log_dir="logs")
    GradientNormLogger()
