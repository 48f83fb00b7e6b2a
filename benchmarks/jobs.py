"""What is measured in a process of its own, and how such a process is started."""

import functools
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import keras

import bandwidth
from memory import peak_of
from modes import accelerator, function_step, samplers
from shapes import Shape, parameters
from timing import interleaved, paired_ratio, quartiles_ms

FLOATS_MOVED = 6
"""Per parameter: the gradient is read twice, momentum and weight are read and written."""

BACKENDS = ("tensorflow", "jax", "torch")
_ON_CPU = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu"}


def alone(job: Callable[..., Any], *arguments: Any, backend: str | None = None) -> Any:
    """Run a job in a new process and return its result.

    The process has memory and devices of its own. It imports one backend, as PyTorch can
    crash beside TensorFlow and its waiting threads would take a core from others. If this
    backend runs on CPUs, the process of another one does, too.

    Args:
        job: a function of a module.
        *arguments: of the job.
        backend: of the process; `None` for the one in use.
    """
    here = keras.backend.backend()
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND=backend or here)
    if backend not in (None, here) and device() is None:
        os.environ.update(_ON_CPU)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(job, *arguments).result()


@functools.cache
def device() -> str | None:
    """Return the name of the accelerator that steps run on, `None` for CPUs.

    A process of its own looks for it, so that this one leaves the accelerator's memory alone.
    """
    return alone(accelerator)


def step_times(
    mode: str, shapes: Sequence[Shape], seconds: float, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Time the contestants that `modes.samplers` returns, interleaved."""
    samples = interleaved(samplers(mode, shapes, names), seconds)
    result = {
        "parameters": parameters(shapes),
        "variables": len(shapes),
        "times_ms": {name: quartiles_ms(values) for name, values in samples.items()},
        "samples": {name: len(values) for name, values in samples.items()},
    }
    if "SNGM" in samples:
        result["over_sngm"] = {
            name: paired_ratio(values, samples["SNGM"])
            for name, values in samples.items()
            if name != "SNGM"
        }
    return result


def memory_limit(shapes: Sequence[Shape]) -> dict[str, Any]:
    """Measure the shortest time in which memory can move the data of a step.

    The fastest library counts, each in a process of its own, for none is the fastest
    everywhere. On an accelerator, which others may not be built for, it is the one in use.
    """
    installed = [backend for backend in BACKENDS if importlib.util.find_spec(backend)]
    measured = [keras.backend.backend()] if device() else installed
    rate, winner = max(alone(bandwidth.measured, backend=backend) for backend in measured)
    return {
        "bandwidth_gb_per_s": rate / 1e9,
        "bandwidth_measured_by": winner,
        "limit_ms": 1e3 * 4 * FLOATS_MOVED * parameters(shapes) / rate,
    }


def step_costs(shapes: Sequence[Shape], name: str) -> dict[str, float | None]:
    """What the first step of a built optimizer costs, and the memory of a later one."""
    step = function_step(name, shapes)
    begin = time.perf_counter()
    first_peak = peak_of(step)
    first_seconds = time.perf_counter() - begin
    for _ in range(3):
        step()
    later_peak = peak_of(step)
    costs: dict[str, float | None] = {"first_step_s": first_seconds}
    for which, peak in (("first", first_peak), ("later", later_peak)):
        known = peak is not None
        costs[f"{which}_step_peak_mb"] = peak / 1e6 if known else None
        costs[f"{which}_step_peak_percent"] = (
            100 * peak / (4 * parameters(shapes)) if known else None
        )
    return costs
