"""Trains, saves, and resumes in another process; see `test_serialization.py`.

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
    """Six batches: an epoch ends inside an accumulation window."""
    for i in range(0, len(X), 8):
        model.train_on_batch(X[i : i + 8], Y[i : i + 8])


def keep(model, path):
    state = [*model.variables, *model.optimizer.variables]
    np.savez(path, *(v.numpy() for v in state))


def checkpoint_of(model):
    import tensorflow as tf

    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def begin(folder):
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
    if form == "keras":
        return keras.saving.load_model(folder / "model.keras")
    model = build_model()
    if form == "weights":
        model.optimizer.build(model.trainable_variables)
        model.load_weights(folder / "model.weights.h5")
    else:
        # Before the optimizer is built: its variables are restored when made.
        status = checkpoint_of(model).read(str(folder / "checkpoint"))
        model.optimizer.build(model.trainable_variables)
        status.assert_existing_objects_matched()
    return model


def resume(folder):
    for form in RESUMABLE:
        model = load(form, folder)
        train_an_epoch(model)
        train_an_epoch(model)
        keep(model, folder / f"{form}.npz")


if __name__ == "__main__":
    {"begin": begin, "resume": resume}[sys.argv[1]](pathlib.Path(sys.argv[2]))
