"""Trains on two replicas until the gradient of one is NaN, with a logger that stops then.

Run by `test_tensorflow.py`, as devices must be configured before TensorFlow starts.
"""

import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_sngm import SNGM, GradientNormLogger
from replica_options import Option
from replica_training import components, make_strategy

BATCH = 24


def trained(
    strategy: tf.distribute.Strategy, optimizer: type, steps: int, bad: bool
) -> keras.Model:
    option = Option({"learning_rate": 0.05})
    with strategy.scope():
        model = option.model(optimizer)
    x, y = (array[: 3 * BATCH] for array in option.data())
    if bad:
        y[3 * BATCH - 1] = np.nan  # on the last replica
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger = GradientNormLogger(on_nonfinite="stop")
        model.fit(batches.repeat(), epochs=4, steps_per_epoch=steps, verbose=0, callbacks=[logger])
    told = any("step 3 is not finite" in str(warning.message) for warning in caught)
    assert told == bad
    return model


def main() -> None:
    strategy = make_strategy(2)
    for optimizer in (SNGM, keras.optimizers.SGD):
        stopped = trained(strategy, optimizer, 3, bad=True)
        with strategy.scope():
            good = Option({"learning_rate": 0.05}).model(optimizer)
        x, y = (array[: 2 * BATCH] for array in Option().data())
        good.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH), verbose=0)
        for got, expected in zip(stopped.weights, good.weights, strict=True):
            for part in components(strategy, got):
                np.testing.assert_array_equal(part.numpy(), expected.numpy())


if __name__ == "__main__":
    main()
