"""Trains on two replicas until the gradient of one is NaN, which makes a logger stop training.

`test_tensorflow.py` runs this in its own process, as devices must be configured before TensorFlow
starts.
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
    """Train on three batches for up to four epochs; the logger must warn of a bad third batch.

    Args:
        strategy: a strategy of two replicas.
        optimizer: the class of the optimizer.
        steps: the number of steps in an epoch.
        bad: whether a target of the third batch is NaN, on the last replica only.

    Returns:
        The model, which a bad batch must have left as it was before that batch.
    """
    option = Option({"learning_rate": 0.05})
    with strategy.scope():
        model = option.model(optimizer)
    x, y = (array[: 3 * BATCH] for array in option.data())
    if bad:
        y[3 * BATCH - 1] = np.nan  # This sample is on the last replica.
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger = GradientNormLogger(on_nonfinite="stop")
        model.fit(batches.repeat(), epochs=4, steps_per_epoch=steps, verbose=0, callbacks=[logger])
    told = any("step 3 is not finite" in str(warning.message) for warning in caught)
    assert told == bad
    return model


def main() -> None:
    """Assert that a bad step leaves the weights as training without it does."""
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
