"""Trains a model with every option, saves it midway, and resumes from files of another backend.

`test_backends.py` runs this in processes of their own, as a process has only one backend:

    KERAS_BACKEND=torch python -c "from backend_training import *; begin('files')"
    KERAS_BACKEND=jax python -c "from backend_training import *; resume('files', 'after', OPTIONS)"
"""

import pathlib
import pickle
from collections.abc import Sequence

import keras
import numpy as np

from keras_sngm import SNGM
from replica_options import BATCH, EPOCHS, FAULTS, OPTIONS, STEPS_PER_EPOCH, Option

SAVED_AFTER = 2
# Models must be saved inside an accumulation cycle of three micro-batches.
assert (SAVED_AFTER * STEPS_PER_EPOCH) % 3


def begin(folder: str) -> None:
    """Train with every option; save each model midway, and write all final values to a file."""
    files = pathlib.Path(folder)
    results = {}
    for i, (name, option) in enumerate({**OPTIONS, **FAULTS}.items()):
        model = started(option)
        fit(model, option, range(SAVED_AFTER))
        model.save(files / f"{i}.keras")
        fit(model, option, range(SAVED_AFTER, EPOCHS))
        results[name] = values_of(model)
        keras.utils.clear_session()  # Layers then have the same names in every job.
    (files / "results").write_bytes(pickle.dumps(results))


def resume(folder: str, output: str, names: Sequence[str]) -> None:
    """Load models that `begin` has saved, train on, and write all final values to a file."""
    results = {}
    for i, (name, option) in enumerate({**OPTIONS, **FAULTS}.items()):
        if name not in names:
            continue
        model = keras.saving.load_model(pathlib.Path(folder) / f"{i}.keras")
        fit(model, option, range(SAVED_AFTER, EPOCHS))
        results[name] = values_of(model)
    pathlib.Path(output).write_bytes(pickle.dumps(results))


def started(option: Option) -> keras.Model:
    """Return a new model with the same weights on every backend.

    Weights come from NumPy, because the random numbers of backends differ.
    """
    model = option.model(SNGM)
    model.optimizer.build(model.trainable_variables)  # so that TensorFlow traces once
    generator = np.random.default_rng(0)
    model.set_weights([0.5 * generator.standard_normal(w.shape) for w in model.get_weights()])
    return model


def fit(model: keras.Model, option: Option, epochs: range) -> None:
    """Train for a range of epochs; callbacks of the option are new at each call."""
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
    """Return the values of all weights and of all variables of the optimizer, in float64."""
    variables = [*model.weights, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(v.value).astype("float64") for v in variables]
