"""The arguments that all benchmarks have."""

import argparse
import pathlib


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """With `--quick`, which is described by `quick`, `--report` and `--output`."""
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
