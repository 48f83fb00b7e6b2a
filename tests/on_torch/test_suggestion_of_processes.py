"""Test of `suggest_learning_rate` in several processes that train one model."""

from processes import SUPPORT, run_python


def test_all_processes_get_the_same_rate():
    """Each process has other data, and so another loss; they compare rates by the mean."""
    printed = run_python(SUPPORT / "torch_suggesting.py").splitlines()
    first, second = printed
    assert first == second
