"""Asks for a learning rate in two processes with different data, and prints what each gets.

python torch_suggesting.py
"""

import json
import sys
import tempfile
import warnings

import keras
import numpy as np
import torch
import torch.distributed
import torch.multiprocessing

from keras_sngm import SNGM, suggest_learning_rate


class Averaged(keras.Sequential):
    """A model that averages gradients over all processes."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self._loss_tracker.update_state(loss)
        loss.backward()
        gradients = [variable.value.grad for variable in self.trainable_variables]
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": self._loss_tracker.result()}


def suggest(rank: int, processes: int, store: str) -> None:
    """Ask in one process.

    Args:
        rank: the index of the process.
        processes: the number of processes.
        store: a file by which the processes find each other.
    """
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
    )
    keras.utils.set_random_seed(0)
    model = Averaged([keras.Input((6,)), keras.layers.Dense(5), keras.layers.Dense(1)])
    model.compile(SNGM(), loss="mse")
    x = np.random.default_rng(rank).standard_normal((48, 6)).astype("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = suggest_learning_rate(model, x, np.tanh(x[:, :1]), 8, 3, verbose=0)
    # One call, so that the lines of both processes stay whole.
    sys.stdout.write(json.dumps([found.learning_rate, list(found.losses.items())]) + "\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(suggest, (2, f"{folder}/store"), nprocs=2)
