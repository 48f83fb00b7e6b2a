"""Command-line arguments whose defaults depend on `--quick`."""

import argparse
from typing import Any


def with_defaults(
    arguments: argparse.Namespace, usual: dict[str, Any], quick: dict[str, Any]
) -> argparse.Namespace:
    """Fills in what was not given on the command line."""
    for name, value in (quick if arguments.quick else usual).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments
