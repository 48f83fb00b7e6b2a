"""Functions that run Python in new processes, which can set up a backend in their own way."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

SUPPORT = pathlib.Path(__file__).parent
ROOT = SUPPORT.parents[1]


class Ended(NamedTuple):
    """The exit status of a process that has ended, and its output."""

    status: int
    printed: str


def importing_project(**environment):
    """Return environment variables for a process that imports this project.

    Args:
        **environment: further environment variables.
    """
    path = [ROOT, ROOT / "tests", SUPPORT, ROOT / "examples", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, path))}


def run_python(*arguments, **environment):
    """Run Python with this project importable, and return what it prints to stdout.

    The process must succeed, and TensorFlow must not warn of retracing.

    Args:
        *arguments: the command line.
        **environment: further environment variables.
    """
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


def run_together(processes, timeout=240):
    """Run Python in several processes at a time, and return how each ended.

    Args:
        processes: the command line and the further environment variables of each process.
        timeout: the seconds after which an error is raised and all processes are killed.

    Returns:
        An `Ended` for each process; its output is stdout and stderr together.
    """
    with contextlib.ExitStack() as cleanup:
        folder = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        logs = [folder / str(i) for i in range(len(processes))]
        running = []
        for (arguments, environment), log in zip(processes, logs, strict=True):
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=importing_project(**environment),
                stdout=cleanup.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            cleanup.callback(process.wait)
            cleanup.callback(process.kill)
            running.append(process)
        deadline = time.monotonic() + timeout
        statuses = [process.wait(deadline - time.monotonic()) for process in running]
        printed = [log.read_text() for log in logs]
    return [Ended(*end) for end in zip(statuses, printed, strict=True)]


def free_ports(count):
    """Return different ports of this machine that are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]
