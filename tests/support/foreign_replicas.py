"""Trains models of many kinds on two replicas, with a logger and without, and compares results.

`test_distribution.py` runs this in its own process, as devices must be configured before
TensorFlow starts.
"""

import keras
import numpy as np
import tensorflow as tf

from foreign_models import MODELS, OPTIMIZERS, Foreign, Optimizer, Y
from keras_sngm import GradientNormLogger
from replica_training import make_strategy

NAMES = ("Sequential without Input", "subclassed", "GAN", "sequences of unknown length")


def trained(
    strategy: tf.distribute.Strategy, foreign: Foreign, optimizer: Optimizer, *loggers
) -> list[np.ndarray]:
    """Train a model with one of `OPTIMIZERS`; return weights and optimizer state of all replicas.

    If there are loggers, they must have logged gradient norms above 0.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = foreign.make(OPTIMIZERS[optimizer]())
    data = tf.data.Dataset.from_tensor_slices((foreign.x, Y)).batch(8)
    history = model.fit(data, epochs=2, verbose=0, callbacks=list(loggers)).history
    if loggers:
        assert min(history["grad_norm_min"]) > 0, history
    return [
        part.numpy()
        for v in [*model.weights, *model.optimizer.variables]
        for part in strategy.experimental_local_results(v.value)
    ]


def main() -> None:
    """Assert that a logger changes nothing in training, to the bit."""
    strategy = make_strategy(2)
    for name in NAMES:
        for optimizer in ("SNGM", "SGD"):
            logger = GradientNormLogger(per_variable=True, update_ratio=True, on_nonfinite="stop")
            plain = trained(strategy, MODELS[name], optimizer)
            logged = trained(strategy, MODELS[name], optimizer, logger)
            for value, expected in zip(logged, plain, strict=True):
                np.testing.assert_array_equal(value, expected, err_msg=f"{name}, {optimizer}")


if __name__ == "__main__":
    main()
