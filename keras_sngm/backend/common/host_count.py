"""Counts on the host that tell an optimizer's progress without waiting for the device."""

import weakref
from typing import Any

import keras


class HostCount:
    """A cached copy on the host of an integer variable.

    It is refreshed if anybody else has assigned to the variable since. It works on backends on
    which an assignment leaves a trace: PyTorch counts assignments to a tensor, and on JAX each
    brings another array.
    """

    def __init__(self) -> None:
        self._mark: tuple[Any, int] = (_nothing, 0)
        self._count = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle and copy the object as an empty one: the cached count belongs to one variable."""
        return type(self), ()

    def of(self, variable: keras.Variable) -> int:
        """Return the variable's value. Waits for the device only if others have assigned to it."""
        if not self.is_own(variable):
            self.set(variable, int(variable.value))
        return self._count

    def is_own(self, variable: keras.Variable) -> bool:
        """Return whether the cached count is current: nobody else has assigned to the variable."""
        value, (known, version) = variable.value, self._mark
        return known() is value and version == _version(value)

    def set(self, variable: keras.Variable, count: int) -> None:
        """Cache `count` as the value that the caller has just assigned to the variable.

        The variable's tensor and its version are kept, to notice assignments by others.
        """
        value = variable.value
        self._count, self._mark = count, (weakref.ref(value), _version(value))


class AccumulationCycle:
    """Record of the variables that had a gradient since the accumulation cycle began."""

    def __init__(self) -> None:
        self._calls = -1
        self._positions: frozenset[int] = frozenset()

    def indices(self, calls: int, micro_batches: int) -> frozenset[int] | None:
        """Return the indices of the variables with a gradient since the cycle began.

        `None` if this object did not see the beginning, because state was loaded for instance.

        Args:
            calls: number of calls of the optimizer so far.
            micro_batches: number of calls that make up an update.
        """
        if calls % micro_batches == 0:
            return frozenset()
        return self._positions if calls == self._calls else None

    def add(self, calls: int, micro_batches: int, indices: frozenset[int]) -> None:
        """Note which variables have a gradient in a call, if the cycle's beginning was seen.

        Args:
            calls: number of calls of the optimizer before this one.
            micro_batches: number of calls that make up an update.
            indices: indices of the variables that have a gradient in this call.
        """
        known = self.indices(calls, micro_batches)
        if known is not None:
            self._calls, self._positions = calls + 1, known | indices


def _version(value: Any) -> int:
    """Return PyTorch's count of in-place assignments to a tensor, 0 on other backends."""
    return getattr(value, "_version", 0)


def _nothing() -> None:
    """Stand in for a weak reference to an object that no longer exists."""
