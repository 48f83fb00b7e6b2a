"""What a variable on the device counts, known to the host without asking each time."""

import weakref
from typing import Any

import keras


class HostCount:
    """Of one variable. The host asks again if anybody else has assigned to it."""

    def __init__(self) -> None:
        self._mark: tuple[Any, int] = (lambda: None, 0)
        self._count = 0

    def of(self, variable: keras.Variable) -> int:
        """The variable's value. Waits for the device only if others have assigned to it."""
        tensor, (known, version) = variable.value, self._mark
        if known() is not tensor or tensor._version != version:
            self.set(variable, int(tensor))
        return self._count

    def set(self, variable: keras.Variable, count: int) -> None:
        """Say what was assigned last."""
        tensor = variable.value
        self._count, self._mark = count, (weakref.ref(tensor), tensor._version)
