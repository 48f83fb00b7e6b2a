"""Rows of numbers that stay on the device until somebody fetches them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

_HIGH = 2**20
_COLUMNS_OF_STEP = 2


class Snapshot(NamedTuple):
    """A copy of a ring as it was, still on the device."""

    count: Any
    rows: Any


class Ring:
    """The newest rows that were written, each with the number of its step.

    Args:
        make_variable: makes a variable of a given shape and dtype.
        length: how many rows there are until the oldest is overwritten.
        columns: length of a row.
    """

    def __init__(
        self, make_variable: Callable[..., keras.Variable], length: int, columns: int
    ) -> None:
        self._length = length
        self._count = make_variable((), "int64")
        self._rows = make_variable((length, _COLUMNS_OF_STEP + columns), "float32")

    def write(self, local: Callable[[Any], tf.Variable], step: tf.Tensor, row: tf.Tensor) -> None:
        """Add a row, as a part of a training step.

        Args:
            local: what a variable is on the device in hand.
            step: int64 scalar.
            row: vector.
        """
        count, rows = local(self._count), local(self._rows)
        # Two halves, as float32 could not hold every step.
        halves = tf.cast(tf.stack([step // _HIGH, step % _HIGH]), tf.float32)
        rows.scatter_update(
            tf.IndexedSlices(
                tf.concat([halves, tf.cast(row, tf.float32)], 0)[tf.newaxis],
                (count % self._length)[tf.newaxis],
            )
        )
        count.assign_add(1)

    def snapshot(self) -> Snapshot:
        """A copy. Does not wait for the device."""
        return Snapshot(*(keras.ops.copy(variable) for variable in (self._count, self._rows)))

    def count(self) -> int:
        """How many rows were written so far. Waits for the device."""
        return int(keras.ops.convert_to_numpy(self._count))

    def since(self, begin: int, snapshot: Snapshot) -> tuple[int, np.ndarray, np.ndarray]:
        """The rows from the one numbered `begin` on. Waits for the device.

        Returns:
            The number that the next row will have, the steps, and the rows.

        Raises:
            RuntimeError: if some of them were overwritten.
        """
        end = int(keras.ops.convert_to_numpy(snapshot.count))
        if end - begin > self._length:
            raise RuntimeError(
                f"{end - begin} updates were made between two looks at them, and only "
                f"{self._length} can be kept."
            )
        places = np.arange(begin, end) % self._length
        rows = keras.ops.convert_to_numpy(snapshot.rows)[places]
        steps = rows[:, 0].astype("int64") * _HIGH + rows[:, 1].astype("int64")
        return end, steps, rows[:, _COLUMNS_OF_STEP:]
