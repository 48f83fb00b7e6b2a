"""Caches of compiled steps."""

from collections.abc import Callable, Hashable
from typing import Any


class Cache:
    """A dictionary that Keras and TensorFlow do not track, and so do not save."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Any] = {}

    def get_or_make(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the entry of a key; call `make` for it if there is none."""
        if key not in self._entries:
            self._entries[key] = make()
        return self._entries[key]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def drop(self, is_old: Callable[[Any], bool]) -> None:
        """Remove the entries whose keys `is_old` is true for."""
        self._entries = {k: entry for k, entry in self._entries.items() if not is_old(k)}
