"""Tests that the number of replicas does not change what is learned, whatever the options."""

import functools
import pickle

import numpy as np
import pytest

from processes import SUPPORT, run_python
from replica_options import EPOCHS, FAULTS, OPTIONS, QUICK_OPTIONS, STEPS_PER_EPOCH
from selection import cases_asked_for, quick_only, whole

replicas = pytest.mark.parametrize("replicas", quick_only([1, 2, 4], quick=[2]))


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Return a function that trains on replicas and returns the results by name of the option.

    The argument of the function is the number of replicas as a string, "0" for no strategy. With
    "2-sngm-in-replicas" two replicas must not enter the cross-replica context. Only options of
    selected tests are trained.
    """
    folder = tmp_path_factory.mktemp("replicas")
    names = [name for (name,) in cases_asked_for(request, "name")]

    @functools.cache
    def train_on(placement):
        count, _, optimizer = placement.partition("-")
        arguments = count, folder / placement, optimizer or "sngm", *names
        run_python(SUPPORT / "replica_training.py", *arguments)
        return pickle.loads((folder / placement).read_bytes())

    return train_on


def assert_same(got, expected, option):
    """Assert that an outcome agrees with the expected one, and that all its replicas agree."""
    assert got.replicas_agree
    assert len(got.norms) == EPOCHS * STEPS_PER_EPOCH
    for value, wanted in zip(
        [*got.weights, *got.state], [*expected.weights, *expected.state], strict=True
    ):
        assert np.linalg.norm(value - wanted) <= option.tolerance * np.linalg.norm(wanted)


@replicas
@pytest.mark.parametrize("name", quick_only(OPTIONS, QUICK_OPTIONS))
def test_replicas_train_like_one_device(results, name, replicas):
    got, expected = results(str(replicas))[name], results("0")[name]
    assert got.replicas == replicas
    assert_same(got, expected, OPTIONS[name])
    np.testing.assert_allclose(got.norms, expected.norms, rtol=OPTIONS[name].tolerance)
    assert got.skipped_steps == 0


@whole
@pytest.mark.parametrize("name", [n for n in OPTIONS if OPTIONS[n].runs_in_replicas])
def test_replicas_that_cannot_be_left_train_like_one_device(results, name):
    """Replicas that must not enter the cross-replica context train like one device.

    TensorFlow forbids `merge_call`, which enters this context, in XLA-compiled functions on GPUs.
    """
    got, expected = results("2-sngm-in-replicas")[name], results("0")[name]
    assert_same(got, expected, OPTIONS[name])
    np.testing.assert_allclose(got.norms, expected.norms, rtol=OPTIONS[name].tolerance)


@pytest.mark.parametrize(
    "name, placement",
    quick_only(
        [
            (name, placement)
            for name in FAULTS
            for placement in ("1", "2", "4", "2-sngm-in-replicas")
            if FAULTS[name].runs_in_replicas or "in-replicas" not in placement
        ],
        quick=[(next(iter(FAULTS)), "2")],
    ),
)
def test_a_fault_on_one_replica_skips_the_step(results, name, placement):
    """All replicas skip a step with a bad sample on one of them; nothing changes, to the bit."""
    got, expected = results(placement)[name], results("0")[name]
    assert_same(got, expected, FAULTS[name])
    assert not got.changed_by_bad_batches
    assert not expected.changed_by_bad_batches
    if not FAULTS[name].loss_scale:
        assert got.skipped_steps == expected.skipped_steps == EPOCHS
        np.testing.assert_allclose(got.norms, expected.norms, rtol=1e-5)


@whole
@pytest.mark.parametrize("name", OPTIONS)
def test_replicas_communicate_once_per_update(results, name):
    updates = (
        EPOCHS * STEPS_PER_EPOCH // OPTIONS[name].arguments.get("gradient_accumulation_steps", 1)
    )
    assert results("4")[name].reductions == updates


@whole
def test_cpus_of_one_machine_send_nothing_to_each_other(results):
    """Gradients are added up in memory, unless the cross-replica context is forbidden."""
    assert not results("2")["collectives"]
    assert results("2-sngm-in-replicas")["collectives"]


@whole
@pytest.mark.parametrize("name", [n for n in OPTIONS if n.startswith("embeddings")])
def test_rows_of_embeddings_travel_as_slices(results, name):
    """Replicas reduce gradients of embeddings as slices, but accumulated gradients as tensors.

    Accumulated gradients fill the whole table.
    """
    accumulates = "gradient_accumulation_steps" in OPTIONS[name].arguments
    assert bool(results("4")[name].sparse_reductions) is not accumulates


@replicas
def test_every_replica_runs_an_xla_program(results, replicas):
    devices = [f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(replicas)]
    assert results(str(replicas))["xla_calls"] == devices


@whole
def test_a_logger_changes_nothing_in_models_of_others():
    run_python(SUPPORT / "foreign_replicas.py")


@whole
def test_a_model_compiled_on_several_devices_says_what_to_set_instead(results):
    assert not results("1")["jit_error"]
    for replicas in ("2", "4"):
        assert 'Set `model.compile(jit_compile="auto")`' in results(replicas)["jit_error"]
        assert "Received: jit_compile=True under MirroredStrategy" in results(replicas)["jit_error"]


@whole
def test_replicas_that_could_disagree_are_refused(results):
    """A `LossScaleOptimizer` is refused where replicas would decide about a step one by one.

    Replicas that decide differently would wait for each other.
    """
    message = results("2-sngm-in-replicas")["loss_scale_error"]
    assert "`LossScaleOptimizer` is such a condition. Set `SNGM(loss_scale_factor=" in message


@whole
def test_replicas_may_have_gradients_of_different_kinds_and_for_different_variables():
    run_python(SUPPORT / "replica_gradients.py")
