"""Runs programs in processes of their own, as settings of TensorFlow need."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def importing_project(**environment):
    """Environment variables for a process that imports this project."""
    path = [TESTS.parent, TESTS, TESTS.parent / "examples", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, path))}


def run_python(*arguments, **environment):
    """Run Python with this project importable; returns what it printed."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=importing_project(**environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "retracing" not in result.stderr, result.stderr
    return result.stdout
