"""Asks for a learning rate on some devices, and prints the losses of all rates as JSON.

python suggesting.py DEVICES

It also checks that all values of all replicas, and the training that follows, are those of a model
that nobody has asked for.
"""

import contextlib
import json
import sys
import warnings

import keras
import numpy as np

from keras_sngm import SNGM, suggest_learning_rate

BATCH, EPOCHS = 16, 8
X = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))


def place_on(devices):
    """Return a function that opens the scope for models on some CPUs, on TensorFlow or JAX."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * devices
        )
        names = [f"CPU:{i}" for i in range(devices)]
        return tf.distribute.MirroredStrategy(names).scope
    if devices > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    return contextlib.nullcontext


def new_model(scope, normalized):
    """Return a compiled model, always with the same weights.

    Args:
        scope: opens the scope for the model.
        normalized: whether it has batch normalization and dropout, which depend on the replica.
    """
    keras.utils.set_random_seed(0)
    layers = [keras.Input((6,)), keras.layers.Dense(8, activation="tanh")]
    if normalized:
        layers += [keras.layers.BatchNormalization(momentum=0.9), keras.layers.Dropout(0.2)]
    with scope():
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile(SNGM(0.1, gradient_accumulation_steps=2), loss="mse")
    return model


def values_of(model):
    """Return the values of all variables on all replicas."""
    variables = [*model.variables, *model.optimizer.variables]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        local = [
            part
            for variable in variables
            for part in getattr(variable.value, "values", (variable.value,))
        ]
        return [tf.convert_to_tensor(part).numpy() for part in local]
    return [
        np.asarray(shard.data)
        for variable in variables
        for shard in variable.value.addressable_shards
    ]


def suggested(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return suggest_learning_rate(model, X, Y, BATCH // 2, EPOCHS, verbose=0)


def check_no_trace(scope):
    """Check that a suggestion changes no value, and not the training that follows."""
    trained = []
    for ask in (False, True):
        model = new_model(scope, normalized=True)
        model.fit(X, Y, BATCH, epochs=1, shuffle=False, verbose=0)
        before = values_of(model)
        if ask:
            suggested(model)
            for now, then in zip(values_of(model), before, strict=True):
                np.testing.assert_array_equal(now, then)
        model.fit(X, Y, BATCH, epochs=2, shuffle=False, verbose=0)
        trained.append(values_of(model))
    for asked, not_asked in zip(*trained, strict=True):
        np.testing.assert_array_equal(asked, not_asked)


def main(devices):
    scope = place_on(devices)
    suggestion = suggested(new_model(scope, normalized=False))
    check_no_trace(scope)
    print(json.dumps([suggestion.learning_rate, list(suggestion.losses.items())]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
