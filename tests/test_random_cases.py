"""Random trainings agree with the reference, call by call, in every way of running a step.

The number of cases of all tests together is `KERAS_SNGM_RANDOM_CASES`.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from problems import BACKEND
from random_cases import (
    LARGEST,
    Case,
    Expectation,
    State,
    assert_as_expected,
    assert_within_the_bound,
    cases,
    numpy_dtype,
    start_of,
)
from random_cases import given as gradients_of
from random_steps import Steps, scanned, side_by_side

# How a step is run, as in `problems.MODES`, and its share of the cases.
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
SHARES = (
    sum(share for *_, share in MODES.values()) + {"tensorflow": 0, "jax": 2, "torch": 3}[BACKEND]
)
DEFAULT = {"tensorflow": 36, "jax": 40, "torch": 200}[BACKEND]
CASES = int(os.environ.get("KERAS_SNGM_RANDOM_CASES", DEFAULT))


def some(share: float) -> settings:
    """Settings of a test that has a share of all cases, the same ones unless asked for more."""
    return settings(
        max_examples=math.ceil(CASES * share),
        derandomize="KERAS_SNGM_RANDOM_CASES" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def follow(case: Case, steps: Steps, expectation: Expectation) -> None:
    """Make the calls of a case, and look at what each has done."""
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
    """Run a test with cases of a strategy."""

    @some(share / SHARES)
    @given(strategy)
    def run_all(case):
        with np.errstate(all="ignore"):
            test(case)

    run_all()


def skips_above(case: Case) -> float:
    """The norm above which PyTorch with CUDA skips a step."""
    only_doubles = all(weight.dtype == "float64" for weight in case.weights)
    return np.inf if only_doubles else LARGEST


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("mode", MODES)
def test_every_call_does_what_the_reference_does(mode):
    jit_compile, outer, share = MODES[mode]
    eager = outer is None or BACKEND == "torch"
    on_cuda = BACKEND == "torch" and has_cuda()

    def follow_one(case):
        most = skips_above(case) if on_cuda else np.inf
        follow(case, Steps(case, jit_compile, outer), Expectation(case, eager, most))

    run(share, cases(eager), follow_one)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.skipif(BACKEND != "torch", reason="other backends have one way for all devices")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("accelerator", ["CUDA", "others"])
def test_the_steps_of_accelerators_do(accelerator, monkeypatch):
    from keras_sngm.backend import torch_kernel, torch_norm, torch_step

    if accelerator == "CUDA":
        for module in (torch_kernel, torch_norm, torch_step):
            monkeypatch.setattr(module, "host_decides", lambda tensor: False)
    monkeypatch.setattr(torch_kernel, "is_on_cpu", lambda tensor: False)

    def follow_one(case):
        most = skips_above(case) if accelerator == "CUDA" else np.inf
        follow(case, Steps(case), Expectation(case, True, most))

    run(1.5, cases(True), follow_one)


def compare(case: Case, states: list[State], gradients: list[list[Any]]) -> None:
    expectation = Expectation(case, eager=False)
    for before, now, own in zip(states, states[1:], gradients):
        assert_as_expected(now, expectation.call(own, before), before, case, expectation)
        assert_within_the_bound(now, before, case, expectation)


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX has it")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_all_calls_of_a_scan_do():
    def scan(case):
        start = [
            value.astype(numpy_dtype(w.dtype)) for value, w in zip(start_of(case), case.weights)
        ]
        gradients = [gradients_of(case, call, start) for call in case.calls]
        compare(case, scanned(case, gradients), gradients)

    run(1, cases(eager=False, alike=True), scan)


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX has it")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_trainings_side_by_side_do():
    def train(case):
        start = [
            value.astype(numpy_dtype(w.dtype)) for value, w in zip(start_of(case), case.weights)
        ]
        gradients = [gradients_of(case, call, start) for call in case.calls]
        in_both = list(zip(gradients, reversed(gradients)))
        states = side_by_side(case, in_both)
        for k in range(2):
            compare(case, [of[k] for of in states], [of[k] for of in in_both])

    run(1, cases(eager=False, alike=True), train)
