"""Collection of the tests of one backend and of one run, as folders and marks say.

A folder tells its backends: `on_jax_and_torch` has what is run on JAX and on PyTorch, `project`
what is run once, in the whole run. `support` has no tests: what they share, and programs that
they start as processes.
"""

import pathlib
import sys

import keras
import pytest

TESTS = pathlib.Path(__file__).parent
# Helpers, examples and the study are imported by name, as programs beside them do.
sys.path += [str(TESTS / "support"), str(TESTS.parent / "examples")]


def pytest_addoption(parser):
    parser.addoption(
        "--run",
        choices=("quick", "rest", "whole"),
        default="quick",
        help="which tests to run: the quick ones (the default), the rest, or all",
    )


def pytest_ignore_collect(collection_path, config):
    """Leave out folders of other backends, and those whose packages a quick run may lack."""
    if collection_path.parent == TESTS and collection_path.is_dir():
        is_needed = is_run_on(collection_path, keras.backend.backend())
        is_project = collection_path.name == "project"
        return True if not is_needed or (is_project and _run(config) == "quick") else None
    return None


def pytest_collection_modifyitems(config, items):
    if _run(config) == "whole":
        return
    wants_quick = _run(config) == "quick"
    left_out = [item for item in items if is_quick(item) != wants_quick]
    items[:] = [item for item in items if is_quick(item) == wants_quick]
    config.hook.pytest_deselected(items=left_out)


def is_run_on(folder, backend):
    """Return whether the tests of a folder are run on a backend."""
    if folder.name == "project":
        return backend == "tensorflow"
    backends = folder.name.removeprefix("on_").split("_and_")
    return folder.name != "support" and (folder.name.startswith("on_") <= (backend in backends))


def is_quick(item):
    """Return whether a test is one of the quick run."""
    is_marked = item.get_closest_marker("whole") is not None
    return not is_marked and TESTS / "project" not in item.path.parents


def _run(config: pytest.Config) -> str:
    return config.getoption("run")
