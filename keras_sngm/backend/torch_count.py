"""What a variable on the device counts, known to the host without asking each time."""

import keras


class HostCount:
    """Of one variable. The host asks again if anybody else has assigned to it."""

    def __init__(self) -> None:
        self._mark: tuple[int, int] | None = None
        self._count = 0

    def of(self, variable: keras.Variable) -> int:
        """The variable's value. Waits for the device only if others have assigned to it."""
        mark = _mark(variable)
        if mark != self._mark:
            self._count, self._mark = int(variable.value), mark
        return self._count

    def set(self, variable: keras.Variable, count: int) -> None:
        """Say what was assigned last."""
        self._count, self._mark = count, _mark(variable)


def _mark(variable: keras.Variable) -> tuple[int, int]:
    tensor = variable.value
    return id(tensor), tensor._version
