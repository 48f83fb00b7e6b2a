"""Collects the tests of the backend in use, which the names of the folders tell.

`on_jax_and_torch` has what is run on JAX and on PyTorch, `project` what is run once. `support`
has no tests: what they share, and programs that they start as processes.
"""

import pathlib
import sys

import keras

TESTS = pathlib.Path(__file__).parent
# Examples and helpers import each other by name, as scripts of one folder do.
sys.path += [str(TESTS / "support"), str(TESTS.parent / "examples")]


def is_run_on(folder, backend):
    """Return whether the tests of a folder are run on a backend."""
    if folder.name == "project":
        return backend == "tensorflow"
    backends = folder.name.removeprefix("on_").split("_and_")
    return folder.name != "support" and (folder.name.startswith("on_") <= (backend in backends))


collect_ignore = [
    folder.name
    for folder in TESTS.iterdir()
    if folder.is_dir() and not is_run_on(folder, keras.backend.backend())
]
