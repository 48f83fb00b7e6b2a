"""Prints the README's table of options: the tests that SNGM passes, and what Keras' SGD does.

It trains SGD with every option on one device and on two replicas, which takes a few minutes.

    python tests/support/support_table.py
"""

import pathlib
import pickle
import tempfile

import numpy as np
from tqdm import tqdm

from processes import SUPPORT, run_python
from replica_options import FAULTS, OPTIONS, Option, Outcome

TESTS_OF_COLUMNS = (
    "on_tensorflow/test_distribution",
    "on_jax/test_jax_distribution",
    "project/test_backends",
)
# Arguments that Keras' SGD does not have.
NOT_OFFERED = {"blockwise", "decoupled_weight_decay", "noise_scale_batch_size"}


def main() -> None:
    """Train SGD with every option, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "outcomes"
        results = {}
        for replicas in tqdm((0, 2), desc="training SGD", unit="strategy"):
            run_python(SUPPORT / "replica_training.py", replicas, path, "sgd")
            results[replicas] = pickle.loads(path.read_bytes())
    for name, option in {**OPTIONS, **FAULTS}.items():
        print(row(name, said_of(option, results[0][name], results[2][name])))


def row(name: str, sgd: str) -> str:
    """Return the table's row of an option, with links to the tests of SNGM."""
    sngm = "step skipped" if name in FAULTS else "same"
    cells = [f"[{sngm}](tests/{test}.py)" for test in TESTS_OF_COLUMNS]
    return f"| {' | '.join([name, *cells, sgd])} |"


def said_of(option: Option, alone: Outcome, on_two: Outcome) -> str:
    """Describe in a few words how Keras' SGD on two replicas compares with one device.

    Args:
        option: the option.
        alone: the result of training on one device.
        on_two: the result of training on two replicas.
    """
    if NOT_OFFERED & set(option.arguments):
        return "not offered"
    if alone.error:
        return f"`{alone.error}`, on one device too"
    if on_two.error:
        return f"`{on_two.error}`"
    one, two = (np.concatenate([w.ravel() for w in o.weights]) for o in (alone, on_two))
    if not np.isfinite(two).all():
        too = "" if np.isfinite(one).all() else ", on one device too"
        return f"weights become NaN{too}"
    difference = np.linalg.norm(two - one) / np.linalg.norm(one)
    return "same" if difference <= option.tolerance else f"differs by {100 * difference:.2g} %"


if __name__ == "__main__":
    main()
