"""Trains on two replicas with BackupAndRestore, and kills itself midway if asked to.

Epochs of six batches end inside an accumulation cycle of four micro-batches.

    python killed_training.py BACKUP OUTPUT.npz [BATCH]

With BATCH, the process kills itself in the batch of this number, counted over all epochs.
"""

import os
import signal
import sys
import threading

import keras
import numpy as np

from keras_sngm import SNGM
from replica_options import BATCH, Option
from replica_training import make_strategy

STEPS_PER_EPOCH, EPOCHS = 6, 3


class Kill(keras.callbacks.Callback):
    """Callback that sends SIGKILL to its process while a batch is being computed.

    Args:
        batch: the number of the batch, counted over all epochs.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self.epoch * STEPS_PER_EPOCH + batch == self.batch:
            threading.Timer(0.001, os.kill, (os.getpid(), signal.SIGKILL)).start()


def data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((STEPS_PER_EPOCH * BATCH, 6)).astype("float32")
    return x, np.sin(x.sum(axis=1, keepdims=True))


def main(backup: str, output: str, kill_in: str = "-1") -> None:
    option = Option(
        {
            "learning_rate": keras.optimizers.schedules.CosineDecay(0.1, STEPS_PER_EPOCH * EPOCHS),
            "weight_decay": 0.01,
            "use_ema": True,
            "gradient_accumulation_steps": 4,
        }
    )
    with make_strategy(2).scope():
        model = option.model(SNGM)
    model.fit(
        *data(),
        batch_size=BATCH,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.BackupAndRestore(backup), Kill(int(kill_in))],
    )
    np.savez(output, *(v.numpy() for v in [*model.weights, *model.optimizer.variables]))


if __name__ == "__main__":
    main(*sys.argv[1:])
