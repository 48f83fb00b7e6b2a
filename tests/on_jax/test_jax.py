"""Tests of what only the JAX backend has, such as `BCOO` gradients, donation and strict modes."""

import gc
import re
import warnings

import jax
import keras
import numpy as np
import pytest
from jax.experimental import sparse

from keras_sngm import SNGM, GradientNormLogger
from problems import values_of, variables_of
from processes import ROOT, run_python


def dense_and_sparse_gradient():
    """Return a gradient of an embedding with 5 rows twice: as a dense array, and as a `BCOO`.

    The `BCOO` has one row three times.
    """
    rows = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
    gradient = sparse.BCOO((rows, np.array([[2], [0], [2], [2]])), shape=(5, 3))
    return gradient.todense(), gradient


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_sparse_gradients_train_like_dense_ones(options, in_graph):
    """Duplicate rows of a sparse gradient are added up before the norm is computed."""
    tables = []
    for gradient in dense_and_sparse_gradient():
        table = keras.Variable(np.ones((5, 3)), dtype="float32")
        optimizer = SNGM(**options)
        optimizer.build([table])
        step = jax.jit(optimizer.stateless_apply) if in_graph else optimizer.stateless_apply
        state = [table.value], [v.value for v in optimizer.variables]
        for _ in range(6):
            state = step(state[1], [gradient], state[0])
        tables.append(np.array(state[0][0]))
    assert not np.array_equal(tables[0], np.ones((5, 3)))
    np.testing.assert_allclose(*tables, rtol=1e-6)


def averaging_model(loss="mse", **compile_options):
    """Return a compiled model whose optimizer keeps moving averages of the weights."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    optimizer = SNGM(use_ema=True, ema_momentum=0.5)
    model.compile(optimizer=optimizer, loss=loss, **compile_options)
    return model


def test_training_goes_on_after_averages_have_replaced_the_weights():
    model = averaging_model()
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")
    model.fit(x, y, verbose=0)
    weights = model.get_weights()
    model.fit(x, y, verbose=0)
    assert not np.array_equal(model.get_weights()[0], weights[0])


def test_the_error_of_a_training_step_is_seen():
    def broken(y, predicted):
        raise NotImplementedError("no such loss")

    with pytest.raises(NotImplementedError, match="no such loss"):
        averaging_model(broken).fit(np.ones((8, 6)), np.ones((8, 1)), verbose=0)


class NoMoreDataError(Exception):
    pass


def test_the_error_of_a_later_step_is_seen_and_overcome(tmp_path):
    """An error amid an epoch reaches the user, and the model trains again with weights from a file.

    Keras has donated the state of the model to the compiled step by then.
    """
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")

    def batches():
        yield from [(x, y)] * 3
        raise NoMoreDataError

    model, logger = averaging_model(steps_per_execution=2), GradientNormLogger()
    with pytest.raises(NoMoreDataError):
        model.fit(batches(), steps_per_epoch=8, verbose=0, callbacks=[logger])
    other = averaging_model()
    other.fit(x, y, verbose=0)
    other.save_weights(tmp_path / "other.weights.h5")
    model.load_weights(tmp_path / "other.weights.h5")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="What an interrupted `fit` had not written")
        model.fit(x, y, verbose=0, callbacks=[logger])
    assert int(model.optimizer.iterations) == 2


def test_a_logger_does_not_have_the_state_fetched_in_every_step(monkeypatch):
    fetched = []
    get_state = keras.Model._get_jax_state
    monkeypatch.setattr(
        keras.Model,
        "_get_jax_state",
        lambda *args, **kwargs: fetched.append(1) or get_state(*args, **kwargs),
    )
    x, y = np.ones((64, 6), "float32"), np.ones((64, 1), "float32")
    counts = []
    for callbacks in ([], [GradientNormLogger(update_ratio=True, on_nonfinite="stop")]):
        averaging_model().fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
        counts.append(len(fetched))
        fetched.clear()
    assert counts[0] == counts[1]


@pytest.mark.parametrize("on_nonfinite", ["warn", "stop"])
def test_a_logger_has_the_training_step_compiled_once(caplog, on_nonfinite):
    """A logger does not change how often the training step is compiled.

    Keras 3.10 compiles the step twice, with a logger or without.
    """
    x, y = np.ones((64, 6), "float32"), np.ones((64, 1), "float32")
    counts = []
    for callbacks in ([], [GradientNormLogger(on_nonfinite=on_nonfinite)]):
        caplog.clear()
        with jax.log_compiles():
            averaging_model().fit(x, y, batch_size=8, callbacks=callbacks)
        lines = "\n".join(record.getMessage() for record in caplog.records)
        counts += [len(re.findall(r"XLA compilation of jit\((?:train|_recorded)_step\)", lines))]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "mode",
    [lambda: jax.debug_nans(True), lambda: jax.numpy_dtype_promotion("strict")],
    ids=["debug_nans", "strict promotion"],
)
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_strict_modes(mode, run_eagerly):
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")
    model = averaging_model(run_eagerly=run_eagerly)
    with mode():
        history = model.fit(x, y, verbose=0, callbacks=[GradientNormLogger(update_ratio=True)])
    assert np.isfinite(history.history["grad_norm"]).all()


ASSIGNED = [
    ({"use_ema": True, "ema_momentum": 0.5}, {"ema_overwrite_frequency": 2}),
    ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}),
    (
        {"gradient_accumulation_steps": 2, "noise_scale_batch_size": 8},
        {"noise_scale_momentum": 0.5},
    ),
    ({}, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("arguments, assigned", ASSIGNED)
def test_assigned_hyper_parameters_take_effect(arguments, assigned):
    """An assigned hyper-parameter takes effect even if the step was compiled before."""
    states = []
    for before in (2, 0):
        (variable,) = variables_of([np.ones(3)])
        optimizer = SNGM(0.1, **arguments)
        optimizer.build([variable])
        gradients = jax.random.normal(jax.random.key(0), (8, 3))
        if before:
            optimizer.apply([gradients[0]])
            state = values_of([variable, *optimizer.variables])
        else:
            for v, value in zip([variable, *optimizer.variables], state):
                v.assign(value)
        for name, value in assigned.items():
            setattr(optimizer, name, value)
        for gradient in gradients[1:]:
            optimizer.apply([gradient])
        states.append(values_of([variable, *optimizer.variables]))
    for got, expected in zip(*states):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_no_compiled_step_outlives_its_logger():
    model = averaging_model(run_eagerly=True)
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")
    alive = []
    for _ in range(3):
        model.fit(x, y, verbose=0, callbacks=[GradientNormLogger()])
        gc.collect()
        alive.append(len(jax.live_arrays()))
    assert alive[0] == alive[1] == alive[2]


def test_float64_where_jax_is_told_to_have_it():
    run_python(
        "-m",
        "pytest",
        "-n",
        "0",
        ROOT / "tests/on_tensorflow_and_torch/test_float64.py",
        JAX_ENABLE_X64="1",
    )
