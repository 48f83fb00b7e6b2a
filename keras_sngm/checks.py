"""Checks of arguments that several public names share."""

from typing import Any


def check_count(name: str, value: Any) -> None:
    """Raise a `ValueError` if an argument is not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value}")
