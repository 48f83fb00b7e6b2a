"""Tests that random trainings agree with the reference under `jax.lax.scan` and `jax.vmap`."""

import pytest

from random_cases import Case, Given, cases, given, numpy_dtype, start_of
from random_runs import compare, run
from random_steps import scanned, side_by_side

pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")


def gradients_of(case: Case) -> list[list[Given]]:
    """Return the gradients of each call of a case, given its initial weights."""
    start = [
        value.astype(numpy_dtype(weight.dtype))
        for value, weight in zip(start_of(case), case.weights)
    ]
    return [given(case, call, start) for call in case.calls]


def test_all_calls_of_a_scan_do_what_the_reference_does():
    def scan(case):
        gradients = gradients_of(case)
        compare(case, scanned(case, gradients), gradients)

    run(1, cases(eager=False, alike=True), scan)


def test_trainings_side_by_side_do_what_the_reference_does():
    def train(case):
        gradients = gradients_of(case)
        in_both = list(zip(gradients, reversed(gradients)))
        states = side_by_side(case, in_both)
        for k in range(2):
            compare(case, [of[k] for of in states], [of[k] for of in in_both])

    run(1, cases(eager=False, alike=True), train)
