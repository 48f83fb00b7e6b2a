"""Runs `examples/multi_worker_jax.py` in a process that dies right after the first checkpoint.

It takes the arguments of the example. `test_jax_multi_worker.py` uses it.
"""

import os
import signal
import time

import multi_worker_jax


class LastCheckpoint(multi_worker_jax.Checkpoint):
    """Callback that kills its process, as a power cut would, after the first checkpoint.

    Each process waits until the first process has written the checkpoint.
    """

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        while not (multi_worker_jax.parse().output / multi_worker_jax.CHECKPOINT).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    multi_worker_jax.Checkpoint = LastCheckpoint
    multi_worker_jax.main()
