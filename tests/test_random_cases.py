"""Test that random trainings agree with the reference after each call, however a step is run."""

import numpy as np
import pytest

from problems import BACKEND
from random_cases import Expectation, cases
from random_runs import MODES, follow, run, skips_above
from random_steps import Steps


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


def has_cuda():
    import torch

    return torch.cuda.is_available()
