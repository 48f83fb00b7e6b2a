"""Every option trains alike on every backend, and goes on with files of other ones."""

import itertools
import pickle

import numpy as np
import pytest

from processes import run_python
from replica_options import FAULTS, OPTIONS, QUICK_OPTIONS

JOBS = {**OPTIONS, **FAULTS}
BACKENDS = ("tensorflow", "jax", "torch")
PAIRS = list(itertools.permutations(BACKENDS, 2))
# What a file says does not depend on who reads it. So with most options each backend goes on
# with files of one other, and with options that have what most others have with files of both.
OF_EVERY_OPTION = (("tensorflow", "jax"), ("jax", "torch"), ("torch", "tensorflow"))
RESUMED = [
    (name, *pair) for pair in PAIRS for name in (JOBS if pair in OF_EVERY_OPTION else QUICK_OPTIONS)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the results of each backend, and of each pair: one wrote the files, one went on."""
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
    run_python("-c", f"import backend_training; backend_training.{call}", KERAS_BACKEND=backend)


def assert_alike(got, expected, tolerance):
    for value, wanted in zip(got, expected, strict=True):
        assert np.linalg.norm(value - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", JOBS)
def test_backends_train_alike(trained, name, backend):
    assert_alike(trained[backend][name], trained["tensorflow"][name], JOBS[name].tolerance)


@pytest.mark.parametrize("name, first, second", RESUMED)
def test_training_goes_on_with_files_of_another_backend(trained, name, first, second):
    assert_alike(trained[first, second][name], trained["tensorflow"][name], JOBS[name].tolerance)
