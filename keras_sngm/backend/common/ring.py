"""Ring buffers of rows of numbers, which stay on the device until they are fetched."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_sngm.measurements import RowsLostError

_HIGH = 2**20
_COLUMNS_OF_STEP = 2


class Snapshot(NamedTuple):
    """A copy of a ring buffer at one time, still on the device.

    Attributes:
        count: integer scalar, the number of rows written until then.
        rows: matrix, the contents of the buffer.
    """

    count: Any
    rows: Any

    def end(self) -> int:
        """Return the number of rows ever written until then. Waits for the device."""
        return int(ops.convert_to_numpy(self.count))


class Ring:
    """A ring buffer on the device: the newest rows that were written, each with its step.

    Each backend writes rows itself: row number `count` goes to place `count % length`.

    Args:
        make_variable: makes a variable of zeros of a given shape and dtype.
        length: number of rows that are kept before the oldest is overwritten.
        columns: length of a row.
    """

    def __init__(
        self, make_variable: Callable[..., keras.Variable], length: int, columns: int
    ) -> None:
        self.length = length
        self.count = make_variable((), "int")
        self.rows = make_variable((length, _COLUMNS_OF_STEP + columns), "float32")

    def snapshot(self, copy: Callable[[keras.Variable], Any]) -> Snapshot:
        """Return a copy of the ring buffer on the device; `copy` copies one of its variables."""
        return Snapshot(copy(self.count), copy(self.rows))

    def new_rows(self, begin: int, snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
        """Fetch the rows of a snapshot, from row number `begin` on. Waits for the device.

        Returns:
            The step of each row, and the rows.

        Raises:
            RowsLostError: if some of the rows were overwritten before.
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
    """Return a row in the format of a ring buffer: the step in two columns, then the values.

    Args:
        step: integer scalar.
        values: vector.
    """
    # A float32 cannot hold every step, so the step is stored in two halves.
    halves = ops.cast(ops.stack([step // _HIGH, step % _HIGH]), "float32")
    return ops.concatenate([halves, ops.cast(values, "float32")])
