"""Asks for a learning rate in a process of a JAX job, and prints the losses of all rates as JSON.

python jax_suggesting.py

The environment says which process of how many this is. It also checks that the training that
follows is that of a model that nobody has asked for.
"""

import json
import os
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_sngm import SNGM, suggest_learning_rate

X = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))


def new_model():
    """Return a compiled model, always with the same weights."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(SNGM(0.1), loss="mse")
    return model


def main():
    if int(os.environ["KERAS_DISTRIBUTION_NUM_PROCESSES"]) > 1:
        keras.distribution.initialize()
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    losses = []
    for ask in (True, False):
        model = new_model()
        if ask:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                found = suggest_learning_rate(model, data, epochs=3, verbose=0)
        losses.append(model.fit(data, epochs=2, verbose=0).history["loss"])
    assert losses[0] == losses[1]
    print(json.dumps([found.learning_rate, list(found.losses.items())]), flush=True)


if __name__ == "__main__":
    main()
