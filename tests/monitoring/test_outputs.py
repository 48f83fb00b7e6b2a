"""Tests of one logger for several models, as in folds or searches: each has its own file."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from foreign_models import X, Y, functional, sequential
from keras_sngm import SNGM, GradientNormLogger
from processes import run_python
from selection import whole

UPDATES = len(X) // 8


def fit(model, logger, *callbacks, epochs=1):
    model.fit(X, Y, 8, epochs, verbose=0, callbacks=[logger, *callbacks])


def steps_in(path):
    """Return the steps in a JSON lines file."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_every_model_has_a_file_of_its_own(tmp_path, suffix):
    """Each model has its own file and folder, in which a second `fit` of the model continues.

    Keras numbers layers from model to model, so columns differ between files.
    """
    logger = GradientNormLogger(tmp_path / "tb", tmp_path / f"log.{suffix}", per_variable=True)
    models = [sequential(SNGM()), functional(SNGM()), sequential(keras.optimizers.SGD())]
    for model in [*models, models[0]]:
        fit(model, logger)
    files = [tmp_path / f"{name}.{suffix}" for name in ("log", "log_1", "log_2")]
    header = suffix == "csv"
    counts = [len(file.read_text().splitlines()) - header for file in files]
    assert counts == [2 * UPDATES, UPDATES, UPDATES]
    for folder, expected in (("tb", 2 * UPDATES), ("tb_1", UPDATES), ("tb_2", UPDATES)):
        events = EventAccumulator(str(tmp_path / folder), size_guidance={"tensors": 0}).Reload()
        assert len(events.Tensors("grad_norm")) == expected
    assert len(list(tmp_path.iterdir())) == 6


def test_one_file_for_all_where_that_is_asked_for(tmp_path):
    """With `append=True` all models are logged in one file."""
    logger = GradientNormLogger(filename=tmp_path / "log.jsonl", append=True)
    for _ in range(2):
        fit(sequential(SNGM()), logger)
    assert steps_in(tmp_path / "log.jsonl") == 2 * list(range(1, UPDATES + 1))
    assert logger.append


def pickled(logger):
    """Return a copy of a logger, made by pickling it."""
    return pickle.loads(pickle.dumps(logger))


def test_a_logger_pickled_by_an_earlier_version_logs(tmp_path):
    """Its state has only the arguments and the numbers of its files."""
    state = GradientNormLogger(filename=tmp_path / "log.jsonl").__getstate__()
    temporary = (
        "_attachment",
        "_watched_model",
        "_recording",
        "_sinks",
        "_must_open",
        "_has_warned",
    )
    logger = GradientNormLogger.__new__(GradientNormLogger)
    vars(logger).update({name: value for name, value in state.items() if name not in temporary})
    fit(sequential(SNGM()), logger)
    assert steps_in(tmp_path / "log.jsonl") == list(range(1, UPDATES + 1))


@whole
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [SNGM, keras.optimizers.Adam])
def test_copies_write_to_files_of_their_own(tmp_path, copied, make):
    """A copy that is made while the original is logging writes to other files."""
    logger, copies = GradientNormLogger(filename=tmp_path / "log.jsonl"), []
    take = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: copies or copies.append(copied(logger))
    )
    fit(sequential(make()), logger, take, epochs=2)
    for model in (sequential(make()), sequential(make())):
        fit(model, copies[0])
    assert steps_in(tmp_path / "log.jsonl") == list(range(1, 2 * UPDATES + 1))
    for name in ("log_1", "log_2"):
        assert steps_in(tmp_path / f"{name}.jsonl") == list(range(1, UPDATES + 1))


@whole
def test_a_copy_in_another_process_overwrites_nothing(tmp_path):
    """Copies in other processes, such as those of a parallel search, overwrite no file."""
    logger = GradientNormLogger(filename=tmp_path / "log.jsonl")
    fit(sequential(SNGM()), logger)
    (tmp_path / "logger").write_bytes(pickle.dumps(logger))
    for _ in range(2):
        run_python(
            "-c",
            """
import pathlib, pickle, sys
from foreign_models import X, Y, sequential
from keras_sngm import SNGM
logger = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
for _ in range(2):
    sequential(SNGM()).fit(X, Y, 8, 2, verbose=0, callbacks=[logger])
""",
            tmp_path / "logger",
            KERAS_BACKEND=keras.backend.backend(),
        )
    assert steps_in(tmp_path / "log.jsonl") == list(range(1, UPDATES + 1))
    for i in range(1, 5):
        assert steps_in(tmp_path / f"log_{i}.jsonl") == list(range(1, 2 * UPDATES + 1))


class Inner(keras.layers.Layer):
    """Layer with two layers inside, whose weights count as its own."""

    def __init__(self):
        super().__init__(name="inner")
        self.parts = [keras.layers.Dense(5, name="first"), keras.layers.Dense(5, name="second")]

    def build(self, shape):
        for part in self.parts:
            part.build((None, 5))

    def call(self, inputs):
        return self.parts[1](self.parts[0](inputs))


class NestedModel(keras.Model):
    """Model with layers in a list, a weight of its own, and another model inside."""

    def __init__(self):
        super().__init__(name="outer")
        self.all = [keras.layers.Dense(5, name="list"), Inner()]
        self.model = functional("sgd")

    def build(self, shape):
        self.scale = self.add_weight(shape=(6,), initializer="ones", name="scale")
        self.all[0].build(shape)
        self.all[1].build((None, 5))

    def call(self, inputs):
        x = self.scale * inputs
        return self.model(x) + keras.ops.mean(self.all[1](self.all[0](x)), axis=-1, keepdims=True)


def nested_model():
    """Return a built and compiled `NestedModel`."""
    model = NestedModel()
    model.build((None, 6))
    model.compile(SNGM(), "mse")
    return model


@pytest.mark.parametrize(
    "make, groups",
    [
        (lambda: functional(SNGM()), {"hidden", "normalized", "head"}),
        (lambda: sequential(SNGM()), {"net/hidden", "net/normalized", "net/head"}),
        (nested_model, {"outer", "outer/list", "outer/inner", "hidden", "normalized", "head"}),
    ],
    ids=["functional", "Sequential", "subclassed"],
)
def test_a_key_for_each_layer(tmp_path, make, groups):
    """Every kind of model has one key for each layer, and for each layer of a model inside."""
    model = make()
    fit(model, GradientNormLogger(filename=tmp_path / "log.jsonl", per_variable="layer"))
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    name = model.name if model.name.startswith("sequential") else "net"
    assert {k.partition("/")[2].replace(name, "net") for k in line if "/" in k} == groups
    squares = sum(value**2 for key, value in line.items() if "/" in key)
    assert line["grad_norm"] == pytest.approx(np.sqrt(squares), rel=1e-5)
