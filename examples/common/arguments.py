"""Helpers for command lines: a check of the backend, and defaults that depend on `--quick`."""

import argparse
from collections.abc import Sequence
from typing import Any

import keras


def parsed_on(
    backend: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the command line of a program that needs a backend; exit if Keras runs on another.

    `--help` works on every backend.
    """
    arguments = parser.parse_args(argv)
    if keras.backend.backend() != backend:
        parser.error(
            f"Keras must run on {backend}: set KERAS_BACKEND={backend} in the environment. "
            f"Received: {keras.backend.backend()}"
        )
    return arguments


def with_defaults(
    arguments: argparse.Namespace, usual: dict[str, Any], quick: dict[str, Any]
) -> argparse.Namespace:
    """Set arguments that the command line leaves out to their defaults, in place.

    Args:
        arguments: the parsed command line; an argument that was left out is `None`.
        usual: defaults without `--quick`.
        quick: defaults with `--quick`.

    Returns:
        The same `arguments`.
    """
    for name, value in (quick if arguments.quick else usual).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments
