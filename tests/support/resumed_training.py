"""Trains, saves, and resumes in another process, for `test_serialization.py`.

python resumed_training.py begin FOLDER     two epochs, save; two more, keep the result
python resumed_training.py resume FOLDER    load each saved form, two epochs, keep the results
"""

import pathlib
import sys

import keras
import numpy as np

from keras_sngm import SNGM

X = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))
RESUMABLE = ["keras", "weights"]
if keras.backend.backend() == "tensorflow":
    RESUMABLE += ["checkpoint"]


def build_model():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    )
    optimizer = SNGM(
        keras.optimizers.schedules.CosineDecay(0.1, 24),
        weight_decay=0.01,
        use_ema=True,
        gradient_accumulation_steps=4,
    )
    optimizer.exclude_from_weight_decay(var_list=[model.layers[0].bias], var_names=["kernel"])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def train_an_epoch(model):
    """Train on six batches. An epoch so ends inside an accumulation cycle of four."""
    for i in range(0, len(X), 8):
        model.train_on_batch(X[i : i + 8], Y[i : i + 8])


def keep(model, path):
    """Write all variables of a model and of its optimizer to a file."""
    state = [*model.variables, *model.optimizer.variables]
    np.savez(path, *(v.numpy() for v in state))


def checkpoint_of(model):
    """Return a TensorFlow checkpoint of the model and its optimizer."""
    import tensorflow as tf

    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def begin(folder):
    """Train two epochs and save in every form; train two more and keep the result."""
    keras.utils.set_random_seed(0)
    model = build_model()
    train_an_epoch(model)
    train_an_epoch(model)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    if "checkpoint" in RESUMABLE:
        checkpoint_of(model).write(str(folder / "checkpoint"))
    train_an_epoch(model)
    train_an_epoch(model)
    keep(model, folder / "uninterrupted.npz")


def load(form, folder):
    """Return a model restored from one of the forms in `RESUMABLE`."""
    if form == "keras":
        return keras.saving.load_model(folder / "model.keras")
    model = build_model()
    if form == "weights":
        model.optimizer.build(model.trainable_variables)
        model.load_weights(folder / "model.weights.h5")
    else:
        # The optimizer is built after reading, as its variables are restored when they are made.
        status = checkpoint_of(model).read(str(folder / "checkpoint"))
        model.optimizer.build(model.trainable_variables)
        status.assert_existing_objects_matched()
    return model


def resume(folder):
    """Restore the model from each saved form, train two epochs and keep the result."""
    for form in RESUMABLE:
        model = load(form, folder)
        train_an_epoch(model)
        train_an_epoch(model)
        keep(model, folder / f"{form}.npz")


if __name__ == "__main__":
    {"begin": begin, "resume": resume}[sys.argv[1]](pathlib.Path(sys.argv[2]))
