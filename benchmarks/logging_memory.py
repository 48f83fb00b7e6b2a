"""Shows that the memory of GradientNormLogger does not grow with the length of an epoch.

It trains a model with 60 variables for one epoch. All values of every update are written to a
CSV file and to TensorBoard. It prints the memory of the process, the number of blocks that
Python has allocated, and the number of updates that the CSV file still lacks.

    python benchmarks/logging_memory.py            20,000 updates, five minutes
    python benchmarks/logging_memory.py --trace    bytes instead of blocks, an hour
    python benchmarks/logging_memory.py --quick    a smoke run
"""

import argparse
import pathlib
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from keras_sngm import SNGM, GradientNormLogger
from memory import resident
from report import print_header, print_row

LAYERS = 30
FEATURES = 4
UPDATES = (1_000, 2_000, 5_000, 10_000, 20_000)
QUICK = (10, 20)


def python_memory() -> str:
    """Return the memory that Python has allocated: bytes if `tracemalloc` traces, else blocks."""
    if tracemalloc.is_tracing():
        return f"{tracemalloc.get_traced_memory()[0] / 1e6:.1f} MB"
    return f"{sys.getallocatedblocks():,} blocks"


class Meter(keras.callbacks.Callback):
    """Callback that prints the memory in use after chosen numbers of updates.

    Args:
        updates: the numbers of updates after which to print, in ascending order.
        filename: the CSV file that a logger writes; its missing updates are counted.
    """

    async_safe = True

    def __init__(self, updates: Sequence[int], filename: pathlib.Path) -> None:
        super().__init__()
        self._updates = updates
        self._filename = filename
        self._bar = tqdm(total=updates[-1], unit="update")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._bar.update()
        if batch + 1 in self._updates:
            with self._bar.external_write_mode():
                print_row(*self._cells(batch + 1))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._bar.close()

    def _cells(self, updates: int) -> list[str]:
        """Return the cells of the table's row for the present number of updates."""
        process = resident()
        return [
            f"{updates:,}",
            "unknown" if process is None else f"{process / 1e6:.0f}",
            python_memory(),
            f"{updates - self._updates_written():,}",
        ]

    def _updates_written(self) -> int:
        """Return the number of lines of the CSV file, without its header."""
        with self._filename.open("rb") as file:
            return max(sum(1 for _ in file) - 1, 0)


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the same batch of two samples without end."""
    x = np.random.default_rng(0).normal(size=(2, FEATURES)).astype("float32")
    while True:
        yield x, x


def measure(updates: Sequence[int], **arguments: Any) -> None:
    """Train for one epoch, and print the memory in use after chosen numbers of updates.

    Args:
        updates: the numbers of updates after which to print, in ascending order. The epoch
            ends at the last one.
        **arguments: keyword arguments of the logger.
    """
    layers = [keras.layers.Dense(FEATURES, "tanh") for _ in range(LAYERS)]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    model.compile(SNGM(1e-3), "mse")
    with tempfile.TemporaryDirectory() as folder:
        filename = pathlib.Path(folder, "log.csv")
        callbacks = [GradientNormLogger(folder, filename, **arguments), Meter(updates, filename)]
        model.fit(batches(), steps_per_epoch=updates[-1], verbose=0, callbacks=callbacks)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20 updates")
    parser.add_argument("--trace", action="store_true", help="trace what Python allocates")
    arguments = parser.parse_args(argv)
    if arguments.trace:
        tracemalloc.start()
    updates = QUICK if arguments.quick else UPDATES
    print_header("updates", "process, MB", "Python", "updates not written yet")
    measure(updates, per_variable=True, update_ratio=True)


if __name__ == "__main__":
    main()
