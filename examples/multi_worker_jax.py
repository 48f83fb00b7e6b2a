r"""Trains one network with SNGM on several machines with `fit`, on Keras' JAX backend.

Two processes on the CPU of this machine:

    KERAS_BACKEND=jax python examples/multi_worker_jax.py

For several machines start the program once on each, with the same arguments and with the
environment variables of `keras.distribution.initialize`: the address of the first process, the
number of processes, and the index of this process.

    export KERAS_DISTRIBUTION_JOB_ADDRESSES=10.0.0.1:1234
    export KERAS_DISTRIBUTION_NUM_PROCESSES=2
    export KERAS_DISTRIBUTION_PROCESS_ID=0
    KERAS_BACKEND=jax python examples/multi_worker_jax.py

All processes together train on the same batches as one process alone, so their number changes
only the rounding of the result. To achieve this, every process passes the same callbacks and the
same `tf.data.Dataset` of whole batches to `fit`, and Keras trains each process on its shard.

When a process dies, the others end too, or can be ended. Then start all processes again with
the same arguments: they resume from the checkpoint in `--output`, which is of the end of an
epoch, with the same result as without the interruption. When training is complete the
checkpoint is removed.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from tqdm import tqdm

from common import data
from common.arguments import parsed_on, with_defaults
from common.progress import Advance
from keras_sngm import GradientNormLogger
from multi_worker import SEED, compiled_model

CHECKPOINT = "checkpoint.weights.h5"


class Checkpoint(keras.callbacks.Callback):
    """Callback that saves weights and optimizer state after each epoch but the last.

    It takes the place of `BackupAndRestore`, which reads the files of its own process. Those
    may be an epoch behind the files of other processes, and all must resume from the same state.

    Args:
        path: the file to write; it is replaced after each epoch.
    """

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if epoch + 1 < self.params["epochs"]:
            partial = self.path.with_name(f"partial-{self.path.name}")
            self.model.save_weights(partial)
            partial.replace(self.path)


def batches(train: tf.data.Dataset, batch_size: int, epochs: range) -> tf.data.Dataset:
    """Return the batches of all processes together for a range of epochs.

    The order of the samples in an epoch depends on the number of the epoch alone.
    """
    size = int(train.cardinality())
    x, y = next(iter(train.batch(size)))

    def order(epoch: tf.Tensor) -> tf.data.Dataset:
        shuffled = tf.random.experimental.stateless_shuffle(tf.range(size), (SEED, epoch))
        return tf.data.Dataset.from_tensor_slices(shuffled[: size - size % batch_size])

    picked = tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(order)
    return picked.batch(batch_size, drop_remainder=True).map(
        lambda i: (tf.gather(x, i), tf.gather(y, i))
    )


def train(
    model: keras.Model,
    task: data.Task,
    steps: int,
    arguments: argparse.Namespace,
    folder: pathlib.Path,
    reports: bool,
) -> None:
    """Train the model, from the first process' last checkpoint on if there is one.

    Args:
        model: a compiled model whose optimizer is built.
        task: the data to train on.
        steps: the number of steps in an epoch.
        arguments: the command line.
        folder: the folder that this process writes to.
        reports: whether this process shows progress.
    """
    last = arguments.output / CHECKPOINT
    if last.exists():
        model.load_weights(last)
    done = int(model.optimizer.iterations) // steps
    if done:
        print(f"Resumed after epoch {done}", flush=True)

    with tqdm(total=arguments.epochs, initial=done, unit="epoch", disable=not reports) as bar:
        model.fit(
            batches(task.train, arguments.batch_size, range(done, arguments.epochs)),
            initial_epoch=done,
            epochs=arguments.epochs,
            steps_per_epoch=steps,
            shuffle=False,
            verbose=0,
            callbacks=[
                GradientNormLogger(filename=folder / "norms.csv", append=True),
                Checkpoint(folder / CHECKPOINT),
                Advance(bar),
            ],
        )


def on_this_machine(processes: int, argv: Sequence[str]) -> int:
    """Run this program in several processes on the CPU; return 0 if all succeed, else 1.

    Args:
        processes: the number of processes.
        argv: the command line of each.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(processes),
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *argv],
            env={**shared, "KERAS_DISTRIBUTION_PROCESS_ID": str(i)},
        )
        for i in range(processes)
    ]
    codes = [process.wait() for process in running]
    return int(any(codes))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little data, two epochs")
    parser.add_argument(
        "--batch-size", type=int, help="of all processes together, default 1000 (quick: 100)"
    )
    parser.add_argument("--epochs", type=int, help="default 60 (quick: 2)")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="how many to start, unless the environment says that this is one of several",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results/multi_worker_jax"),
        help="a folder that all processes can read",
    )
    return with_defaults(
        parsed_on("jax", parser, argv),
        usual={"batch_size": 1000, "epochs": 60},
        quick={"batch_size": 100, "epochs": 2},
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" not in os.environ:
        # The data are generated once here, before several processes read them.
        data.load("mnist1d", arguments.quick)
        sys.exit(on_this_machine(arguments.processes, argv))

    # Initialization comes first: once JAX has made an array, it cannot join other processes.
    keras.distribution.initialize()
    # TensorFlow only reads the data, and would take the memory of GPUs that JAX needs.
    tf.config.set_visible_devices([], "GPU")
    task = data.load("mnist1d", arguments.quick)
    # `load` seeds NumPy when it generates the data, so the seed must be set after it.
    keras.utils.set_random_seed(SEED)
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    steps = int(task.train.cardinality()) // arguments.batch_size
    model = compiled_model(task, arguments.epochs * steps)

    reports = os.environ["KERAS_DISTRIBUTION_PROCESS_ID"] == "0"
    # All processes must take part in saving, because Keras creates variables meanwhile. But
    # only one may write each file.
    with tempfile.TemporaryDirectory() as discarded:
        folder = arguments.output if reports else pathlib.Path(discarded)
        folder.mkdir(parents=True, exist_ok=True)
        train(model, task, steps, arguments, folder, reports)
        model.save(folder / "model.keras")
    if reports:
        (folder / CHECKPOINT).unlink(missing_ok=True)
        # Evaluation is outside the distribution, so that it does not need the other processes.
        keras.distribution.set_distribution(None)
        trained = keras.saving.load_model(folder / "model.keras")
        _, accuracy = trained.evaluate(task.test.batch(1_000), verbose=0)
        print(f"Test accuracy {100 * accuracy:.1f} %\nWrote {folder / 'model.keras'}")


if __name__ == "__main__":
    main()
