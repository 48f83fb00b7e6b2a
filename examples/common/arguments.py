"""Command-line arguments, for one backend alone or with defaults that depend on `--quick`."""

import argparse
from collections.abc import Sequence
from typing import Any

import keras


def parsed_on(
    backend: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the command line of a program that needs a backend; exit if Keras runs on another.

    `--help` works on all of them.
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
    """Fills in what was not given on the command line."""
    for name, value in (quick if arguments.quick else usual).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments
