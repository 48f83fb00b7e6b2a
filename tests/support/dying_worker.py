"""Runs `examples/multi_worker.py` in a worker that dies right after the first checkpoint.

It takes the arguments of the example. `test_multi_worker.py` uses it.
"""

import os
import signal
import time

import tensorflow as tf

import multi_worker


class LastCheckpoint(tf.train.CheckpointManager):
    """Checkpoint manager that kills its process, as a power cut would, after the first checkpoint.

    Each worker waits until the chief has written the checkpoint.
    """

    def save(self, **kwargs):
        super().save(**kwargs)
        while not tf.train.latest_checkpoint(multi_worker.parse().output / "checkpoints"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    tf.train.CheckpointManager = LastCheckpoint
    multi_worker.main()
