"""Functions that run random cases and compare the state after each call with the reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given

from problems import BACKEND
from random_cases import (
    LARGEST,
    Case,
    Expectation,
    State,
    assert_as_expected,
    assert_within_the_bound,
)
from random_cases import given as gradients_of
from random_settings import random_settings
from random_steps import Steps

# Ways to run a step: the `jit_compile` of SNGM and that of the function around it, as in
# `problems.MODES`, and the share of the cases that are run in this way.
MODES = {
    "tensorflow": {
        "eager": (False, None, 4),
        "eager-auto": ("auto", None, 4),
        "eager-xla": (True, None, 2),
        "function": (False, False, 4),
        "function-xla-step": (True, False, 2),
        "xla-function": ("auto", True, 2),
    },
    "jax": {
        "eager": ("auto", None, 4),
        "jit": ("auto", True, 2),
        "donated": ("auto", "donate", 2),
    },
    "torch": {"eager": ("auto", None, 8), "compiled": ("auto", True, 1)},
}[BACKEND]
# Further tests have two shares on JAX and three on PyTorch.
SHARES = (
    sum(share for *_, share in MODES.values()) + {"tensorflow": 0, "jax": 2, "torch": 3}[BACKEND]
)
USUAL_CASES = {"tensorflow": 30, "jax": 28, "torch": 200}[BACKEND]


def follow(case: Case, steps: Steps, expectation: Expectation) -> None:
    """Make the calls of a case one by one, and assert that each does what is expected."""
    for call in case.calls:
        before = steps.state()
        gradients = gradients_of(case, call, before.weights)
        if call.before == "move":
            steps.move()
        elif call.before == "rewind":
            steps.rewind(gradients)
        elif call.before:
            steps.assign(*call.before)
            expectation.assign(*call.before)
        steps.call(gradients)
        now = steps.state()
        expected = expectation.call(gradients, before)
        assert_as_expected(now, expected, before, case, expectation)
        assert_within_the_bound(now, before, case, expectation)


def run(share: float, strategy: Any, test: Callable[[Case], None]) -> None:
    """Run a test with random cases.

    Args:
        share: its share of the number of all cases, which is `SHARES` in total.
        strategy: a strategy for cases.
        test: a function of a case.
    """

    @random_settings(USUAL_CASES * share / SHARES, share / SHARES)
    @given(strategy)
    def run_all(case):
        with np.errstate(all="ignore"):
            test(case)

    run_all()


def skips_above(case: Case) -> float:
    """Return the norm of the gradient above which a step on PyTorch with CUDA is skipped."""
    only_doubles = all(weight.dtype == "float64" for weight in case.weights)
    return np.inf if only_doubles else LARGEST


def compare(case: Case, states: list[State], gradients: list[list[Any]]) -> None:
    """Assert that compiled calls of a case had the expected effects.

    Args:
        case: the case.
        states: the state before the first call and after each call.
        gradients: the gradients of each call.
    """
    expectation = Expectation(case, eager=False)
    for before, now, own in zip(states, states[1:], gradients):
        assert_as_expected(now, expectation.call(own, before), before, case, expectation)
        assert_within_the_bound(now, before, case, expectation)
