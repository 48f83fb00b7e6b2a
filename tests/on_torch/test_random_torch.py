"""Test that random trainings agree with the reference in the steps of accelerators, on CPUs."""

import numpy as np
import pytest

from keras_sngm.backend.torch import sgd_kernel as torch_kernel
from random_cases import Expectation, cases
from random_runs import follow, run, skips_above
from random_steps import Steps
from torch_paths import take_path_of_cuda


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("accelerator", ["CUDA", "others"])
def test_the_steps_of_accelerators_do_what_the_reference_does(accelerator, monkeypatch):
    if accelerator == "CUDA":
        take_path_of_cuda(monkeypatch)
    monkeypatch.setattr(torch_kernel, "is_on_cpu", lambda tensor: False)

    def follow_one(case):
        most = skips_above(case) if accelerator == "CUDA" else np.inf
        follow(case, Steps(case), Expectation(case, True, most))

    run(1.5, cases(True), follow_one)
