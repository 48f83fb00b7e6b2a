"""Trains a model in N processes with DistributedDataParallel, and writes weights and state.

python torch_processes.py OUTPUT N
"""

import pickle
import sys
import tempfile

import keras
import numpy as np
import torch
import torch.distributed
import torch.multiprocessing

from keras_sngm import SNGM

BATCH, STEPS = 16, 12


def train(rank: int, processes: int, store: str, output: str) -> None:
    """Train in one process on its shard of each batch; the process of rank 0 writes the result.

    Args:
        rank: the index of the process.
        processes: the number of processes.
        store: a file by which the processes find each other.
        output: the file of the result.
    """
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
    )
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    )
    optimizer = SNGM(0.1, gradient_accumulation_steps=2, weight_decay=0.1, clipnorm=0.5)
    optimizer.build(model.trainable_variables)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    x = np.random.default_rng(0).standard_normal((STEPS, BATCH, 6)).astype("float32")
    shard = BATCH // processes
    for batch in torch.from_numpy(x)[:, rank * shard : (rank + 1) * shard]:
        parallel.zero_grad()
        (parallel(batch) - torch.tanh(batch.sum(1, keepdim=True))).square().mean().backward()
        variables = model.trainable_variables
        optimizer.apply([variable.value.grad for variable in variables], variables)
    if rank == 0:
        values = [v.numpy() for v in [*model.weights, *optimizer.variables]]
        with open(output, "wb") as file:
            pickle.dump(values, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    count = int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (count, f"{folder}/store", sys.argv[1]), nprocs=count)
