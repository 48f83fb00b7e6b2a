"""What the host knows of an optimizer's progress without asking the device."""

import weakref
from typing import Any

import keras


class HostCount:
    """Copy on the host of what a variable counts, renewed if anybody else has assigned to it.

    For backends on which an assignment leaves a trace: PyTorch, which counts them, and JAX,
    where each brings another array.
    """

    def __init__(self) -> None:
        self._mark: tuple[Any, int] = (_nothing, 0)
        self._count = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def of(self, variable: keras.Variable) -> int:
        """The variable's value. Waits for the device only if others have assigned to it."""
        if not self.is_own(variable):
            self.set(variable, int(variable.value))
        return self._count

    def is_own(self, variable: keras.Variable) -> bool:
        """Return whether nobody else has assigned to it."""
        value, (known, version) = variable.value, self._mark
        return known() is value and version == _version(value)

    def set(self, variable: keras.Variable, count: int) -> None:
        """Say what was assigned last."""
        value = variable.value
        self._count, self._mark = count, (weakref.ref(value), _version(value))


class AccumulationCycle:
    """Which variables had a gradient in those micro-batches of an update that there were."""

    def __init__(self) -> None:
        self._calls = -1
        self._positions: frozenset[int] = frozenset()

    def indices(self, calls: int, micro_batches: int) -> frozenset[int] | None:
        """Return the positions of these variables, `None` if that is not known.

        Args:
            calls: how many calls there were.
            times: how many make up an update.
        """
        if calls % micro_batches == 0:
            return frozenset()
        return self._positions if calls == self._calls else None

    def add(self, calls: int, micro_batches: int, indices: frozenset[int]) -> None:
        """Note whose gradients are in the next call.

        Args:
            calls: how many calls there were before.
            times: how many make up an update.
            positions: of these variables.
        """
        known = self.indices(calls, micro_batches)
        if known is not None:
            self._calls, self._positions = calls + 1, known | indices


def _version(value: Any) -> int:
    return getattr(value, "_version", 0)


def _nothing() -> None:
    return None
