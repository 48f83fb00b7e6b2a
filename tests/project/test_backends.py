"""Tests that all options train alike on all backends, and resume from files of other backends."""

import itertools
import pickle

import numpy as np
import pytest

from processes import run_python
from replica_options import FAULTS, OPTIONS, QUICK_OPTIONS

JOBS = {**OPTIONS, **FAULTS}
BACKENDS = ("tensorflow", "jax", "torch")
PAIRS = list(itertools.permutations(BACKENDS, 2))
# The content of a file does not depend on the backend that reads it. So each backend resumes from
# files of one other backend with every option, and from files of both with `QUICK_OPTIONS`, which
# together have what most others have.
OF_EVERY_OPTION = (("tensorflow", "jax"), ("jax", "torch"), ("torch", "tensorflow"))
RESUMED = [
    (name, *pair) for pair in PAIRS for name in (JOBS if pair in OF_EVERY_OPTION else QUICK_OPTIONS)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train on each backend; return the results of each backend, and of each pair of backends.

    The first backend of a pair has saved the models midway, the second has loaded and trained them.
    """
    folders = {backend: tmp_path_factory.mktemp(backend) for backend in BACKENDS}
    results = {}
    for backend, folder in folders.items():
        run(backend, f"begin({str(folder)!r})")
        results[backend] = pickle.loads((folder / "results").read_bytes())
    for first, second in PAIRS:
        output = folders[second] / f"after-{first}"
        names = [name for name, *pair in RESUMED if pair == [first, second]]
        run(second, f"resume({str(folders[first])!r}, {str(output)!r}, {names})")
        results[first, second] = pickle.loads(output.read_bytes())
    return results


def run(backend, call):
    """Call a function of `backend_training` in a process with this backend."""
    run_python("-c", f"import backend_training; backend_training.{call}", KERAS_BACKEND=backend)


def assert_alike(got, expected, tolerance):
    """Assert for each array that norm(error) <= tolerance * norm(expected array)."""
    for value, wanted in zip(got, expected, strict=True):
        assert np.linalg.norm(value - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", JOBS)
def test_backends_train_alike(trained, name, backend):
    assert_alike(trained[backend][name], trained["tensorflow"][name], JOBS[name].tolerance)


@pytest.mark.parametrize("name, first, second", RESUMED)
def test_training_goes_on_with_files_of_another_backend(trained, name, first, second):
    assert_alike(trained[first, second][name], trained["tensorflow"][name], JOBS[name].tolerance)
