"""Tests of `suggest_learning_rate` on several devices of one machine."""

import json

import numpy as np

from processes import SUPPORT, run_python


def printed_on(devices):
    """Return the suggestion, and the losses of all rates, on some CPUs in a new process."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    printed = run_python(SUPPORT / "suggesting.py", devices, XLA_FLAGS=flags)
    return json.loads(printed.splitlines()[-1])


def test_one_and_two_replicas_suggest_the_same_rate():
    """Rates agree, losses nearly, and no replica's values change."""
    (one, losses), (two, losses_of_two) = printed_on(1), printed_on(2)
    assert one == two
    np.testing.assert_allclose(losses, losses_of_two, rtol=1e-4)
