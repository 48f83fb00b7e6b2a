"""Test of a training process that is killed at any moment."""

import signal
import subprocess
import sys

import numpy as np

from processes import SUPPORT, importing_project
from selection import whole

SCRIPT = SUPPORT / "killed_training.py"


def train(*arguments):
    """Run `killed_training.py`, and return its exit status."""
    process = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=importing_project(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return process.returncode


@whole
def test_killed_training_resumes_to_the_same_weights(tmp_path):
    """Training that is killed three times and resumed ends with the same weights.

    The process is killed in the first epoch, inside a later accumulation cycle, and at the end.
    """
    backup, undisturbed, resumed = (tmp_path / name for name in ("backup", "0.npz", "1.npz"))
    assert train(tmp_path / "other", undisturbed) == 0
    for batch in (3, 6, 17):
        assert train(backup, resumed, batch) == -signal.SIGKILL
        assert not resumed.exists()
        assert backup.exists() == (batch > 3)
    assert train(backup, resumed) == 0
    with np.load(undisturbed) as expected, np.load(resumed) as got:
        assert len(got.files) == len(expected.files) > 10
        for name in expected.files:
            error = np.linalg.norm(got[name] - expected[name])
            assert error <= 1e-6 * np.linalg.norm(expected[name])
