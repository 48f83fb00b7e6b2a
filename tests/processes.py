"""Runs programs in processes of their own, as settings of TensorFlow need."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def run_python(*arguments, **environment):
    """Run Python with this project importable; returns what it printed."""
    path = [TESTS.parent, TESTS, TESTS.parent / "examples", os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "retracing" not in result.stderr, result.stderr
    return result.stdout
