"""Trains every option, saves it on the way, and goes on with files of another backend.

Run by `test_backends.py`, as a process has one backend:

    KERAS_BACKEND=torch python -c "import backend_training as t; t.begin('files')"
    KERAS_BACKEND=jax python -c "import backend_training as t; t.resume('files', 'results')"
"""

import pathlib
import pickle

import keras
import numpy as np

from keras_sngm import SNGM
from replica_options import BATCH, EPOCHS, FAULTS, OPTIONS, STEPS_PER_EPOCH, Option

SAVED_AFTER = 2
# A step of this number lies inside of a window of accumulation.
assert (SAVED_AFTER * STEPS_PER_EPOCH) % 3


def begin(folder: str) -> None:
    """Writes a file of each model on its way, and what came out in the end."""
    files = pathlib.Path(folder)
    results = {}
    for i, (name, option) in enumerate({**OPTIONS, **FAULTS}.items()):
        model = started(option)
        fit(model, option, range(SAVED_AFTER))
        model.save(files / f"{i}.keras")
        fit(model, option, range(SAVED_AFTER, EPOCHS))
        results[name] = values_of(model)
        keras.utils.clear_session()  # so that layers have the same names in every job
    (files / "results").write_bytes(pickle.dumps(results))


def resume(folder: str, output: str) -> None:
    """Takes the files and writes what came out."""
    results = {}
    for i, (name, option) in enumerate({**OPTIONS, **FAULTS}.items()):
        model = keras.saving.load_model(pathlib.Path(folder) / f"{i}.keras")
        fit(model, option, range(SAVED_AFTER, EPOCHS))
        results[name] = values_of(model)
    pathlib.Path(output).write_bytes(pickle.dumps(results))


def started(option: Option) -> keras.Model:
    """The same weights on every backend, whose random numbers differ."""
    model = option.model(SNGM)
    generator = np.random.default_rng(0)
    model.set_weights([0.5 * generator.standard_normal(w.shape) for w in model.get_weights()])
    return model


def fit(model: keras.Model, option: Option, epochs: range) -> None:
    model.fit(
        *option.data(),
        batch_size=BATCH,
        initial_epoch=epochs.start,
        epochs=epochs.stop,
        shuffle=False,
        verbose=0,
        callbacks=[make() for make in option.callbacks],
    )


def values_of(model: keras.Model) -> list[np.ndarray]:
    """Of all that training changes."""
    variables = [*model.weights, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(v.value).astype("float64") for v in variables]
