"""Test of `suggest_learning_rate` in several processes that train one model."""

import json

import numpy as np

from processes import SUPPORT, free_ports, run_together


def printed_by(processes):
    """Return what each process of a job gets: the suggestion, and the losses of all rates."""
    (port,) = free_ports(1)
    shared = {
        "JAX_PLATFORMS": "cpu",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"localhost:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(processes),
    }
    ended = run_together(
        [
            ([SUPPORT / "jax_suggesting.py"], {**shared, "KERAS_DISTRIBUTION_PROCESS_ID": str(i)})
            for i in range(processes)
        ]
    )
    assert [one.status for one in ended] == [0] * processes, ended
    lines = [line for one in ended for line in one.printed.splitlines() if line.startswith("[0")]
    return [json.loads(line) for line in lines]


def test_all_processes_get_the_rate_of_one():
    (alone,) = printed_by(1)
    first, second = printed_by(2)
    assert first == second
    assert first[0] == alone[0]
    np.testing.assert_allclose(first[1], alone[1], rtol=1e-4)
