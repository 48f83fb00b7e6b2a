"""Selection of the tests to collect, by the Keras backend in use and by the option `--run`.

The name of a folder says on which backends its tests run. `on_jax_and_torch` is for JAX and
PyTorch. `project` is for TensorFlow alone, as its tests need to run once, and is not part of the
quick run. Tests in other folders run on every backend. `support` has no tests, but helpers that
tests share and programs that tests start as processes.
"""

import pathlib
import sys

import keras
import pytest

TESTS = pathlib.Path(__file__).parent
# Tests import helpers, examples and the study by name, as programs in the same folders do.
sys.path += [str(TESTS / "support"), str(TESTS.parent / "examples")]


def pytest_addoption(parser):
    parser.addoption(
        "--run",
        choices=("quick", "rest", "whole"),
        default="quick",
        help="which tests to run: the quick ones (the default), the rest, or all",
    )


def pytest_ignore_collect(collection_path, config):
    """Ignore the folders for other backends, and in a quick run `project`.

    An environment for quick runs may lack the packages that `project` needs.
    """
    if collection_path.parent == TESTS and collection_path.is_dir():
        is_needed = is_run_on(collection_path, keras.backend.backend())
        is_project = collection_path.name == "project"
        return True if not is_needed or (is_project and _run(config) == "quick") else None
    return None


def pytest_collection_modifyitems(config, items):
    """Deselect the tests that the option `--run` leaves out."""
    if _run(config) == "whole":
        return
    parts = {True: [], False: []}
    for item in items:
        parts[is_quick(item)].append(item)
    wants_quick = _run(config) == "quick"
    items[:] = parts[wants_quick]
    config.hook.pytest_deselected(items=parts[not wants_quick])


def is_run_on(folder, backend):
    """Return whether the tests of a folder below `tests` are run on a backend."""
    if folder.name == "project":
        return backend == "tensorflow"
    backends = folder.name.removeprefix("on_").split("_and_")
    return folder.name != "support" and (folder.name.startswith("on_") <= (backend in backends))


def is_quick(item):
    """Return whether a test belongs to the quick run."""
    is_marked = item.get_closest_marker("whole") is not None
    return not is_marked and TESTS / "project" not in item.path.parents


def _run(config: pytest.Config) -> str:
    """Return the value of the option `--run`."""
    return config.getoption("run")
