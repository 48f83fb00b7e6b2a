"""A worker of `examples/multi_worker.py` that dies right after the first checkpoint.

It takes the arguments of the example; see `test_multi_worker.py`.
"""

import os
import signal
import time

import tensorflow as tf

import multi_worker


class LastCheckpoint(tf.train.CheckpointManager):
    """Dies as on a power cut, once the chief has written its checkpoint."""

    def save(self, **kwargs):
        super().save(**kwargs)
        while not tf.train.latest_checkpoint(multi_worker.parse().output / "checkpoints"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    tf.train.CheckpointManager = LastCheckpoint
    multi_worker.main()
