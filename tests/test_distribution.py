"""The number of replicas does not change what is learned."""

import numpy as np
import pytest

from processes import TESTS, run_python

pytestmark = pytest.mark.xdist_group("distribution")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What training gave without a strategy (0) and on so many replicas."""
    folder = tmp_path_factory.mktemp("replicas")
    results = {}
    for replicas in (0, 1, 2, 4):
        output = folder / f"{replicas}.npz"
        run_python(TESTS / "replica_training.py", replicas, output)
        results[replicas] = dict(np.load(output))
    return results


def state_of(result):
    return [result[f"state_{i}"] for i in range(sum("state_" in name for name in result))]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_train_like_one_device(trained, replicas):
    assert trained[replicas]["replicas"] == replicas
    assert len(trained[0]["norms"]) == 16
    np.testing.assert_allclose(trained[replicas]["norms"], trained[0]["norms"], rtol=1e-5)
    for value, expected in zip(state_of(trained[replicas]), state_of(trained[0]), strict=True):
        assert np.linalg.norm(value - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_stay_equal_to_the_bit(trained, replicas):
    assert trained[replicas]["replicas_agree"]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_replica_runs_an_xla_program(trained, replicas):
    devices = [f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(replicas)]
    assert list(trained[replicas]["xla_calls"]) == devices
