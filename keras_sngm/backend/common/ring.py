"""Rows of numbers that stay on the device until somebody fetches them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_sngm.measurements import RowsLostError

_HIGH = 2**20
_COLUMNS_OF_STEP = 2


class Snapshot(NamedTuple):
    """A copy of a ring as it was, still on the device."""

    count: Any
    rows: Any

    def end(self) -> int:
        """The number that the next row will have. Waits for the device."""
        return int(ops.convert_to_numpy(self.count))


class Ring:
    """The newest rows that were written, each with the number of its step.

    A backend writes them: the row numbered `count` goes to place `count % length`.

    Args:
        make_variable: makes a variable of a given shape and dtype.
        length: how many rows there are until the oldest is overwritten.
        columns: length of a row.
    """

    def __init__(
        self, make_variable: Callable[..., keras.Variable], length: int, columns: int
    ) -> None:
        self.length = length
        self.count = make_variable((), "int")
        self.rows = make_variable((length, _COLUMNS_OF_STEP + columns), "float32")

    def snapshot(self, copy: Callable[[keras.Variable], Any]) -> Snapshot:
        """Copies, made by `copy`."""
        return Snapshot(copy(self.count), copy(self.rows))

    def since(self, begin: int, snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
        """The rows from the one numbered `begin` on. Waits for the device.

        Returns:
            The steps, and the rows.

        Raises:
            RowsLostError: if some of them were overwritten.
        """
        end = snapshot.end()
        if end - begin > self.length:
            raise RowsLostError(
                f"{end - begin} updates were made between two looks at them, and only "
                f"{self.length} can be kept. They are not logged."
            )
        places = np.arange(begin, end) % self.length
        rows = ops.convert_to_numpy(snapshot.rows)[places]
        steps = rows[:, 0].astype("int64") * _HIGH + rows[:, 1].astype("int64")
        return steps, rows[:, _COLUMNS_OF_STEP:]


def row_of(step: Any, values: Any) -> Any:
    """A row as a ring holds it.

    Args:
        step: integer scalar.
        values: vector.
    """
    # Two halves, as float32 could not hold every step.
    halves = ops.cast(ops.stack([step // _HIGH, step % _HIGH]), "float32")
    return ops.concatenate([halves, ops.cast(values, "float32")])
