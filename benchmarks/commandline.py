"""Command-line arguments that benchmarks share."""

import argparse
import pathlib


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments `--quick`, `--report` and `--output`.

    Args:
        description: the text of `--help`.
        quick: the help of `--quick`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parents[1] / "docs" / "step_time",
    )
    return parser
