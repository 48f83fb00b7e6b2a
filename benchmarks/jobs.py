"""Measurements that run in a process of their own, and the function that starts it."""

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
from timing import paired_ratio, quartiles_ms, sample_interleaved

FLOATS_MOVED = 6
"""Floats that a step moves per parameter: it reads the gradient twice, and reads and writes both
momentum and weight."""

BACKENDS = ("tensorflow", "jax", "torch")
# Each of these environment variables keeps one backend off an accelerator.
_ON_CPU = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu"}


def run_in_new_process(job: Callable[..., Any], *arguments: Any, backend: str | None = None) -> Any:
    """Run a job in a new process and return its result.

    The process has its own memory and devices. It imports one backend only: PyTorch can
    crash beside TensorFlow, and PyTorch's waiting threads would take a core from other
    libraries. If the backend in use runs on CPUs, a process with another backend does, too.

    Args:
        job: a function that can be pickled, so one at the top level of a module.
        *arguments: the arguments of the job.
        backend: the Keras backend of the new process; `None` for the backend in use.
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
    """Return the name of the accelerator that steps run on, or `None` for CPUs.

    A new process looks for the accelerator, so that this process does not occupy its memory.
    """
    return run_in_new_process(accelerator)


def step_times(
    mode: str, shapes: Sequence[Shape], seconds: float, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Time the steps of several contestants, interleaved, and return quartiles and counts.

    Args:
        mode: a way to take a step, a key of `modes.CONTESTANTS`.
        shapes: the shapes of the weights.
        seconds: the time to measure for, all contestants together.
        names: the contestants; `None` for all whose steps this backend can take.
    """
    samples = sample_interleaved(samplers(mode, shapes, names), seconds)
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
    """Measure the shortest time in which memory can move the data of one step.

    Each installed library measures the bandwidth in its own process and the fastest counts,
    because none is the fastest on every machine. On an accelerator only the backend in use
    measures, because other libraries may not be built for that accelerator.
    """
    installed = [backend for backend in BACKENDS if importlib.util.find_spec(backend)]
    measured = [keras.backend.backend()] if device() else installed
    rate, winner = max(
        run_in_new_process(bandwidth.measure_bandwidth, backend=backend) for backend in measured
    )
    return {
        "bandwidth_gb_per_s": rate / 1e9,
        "bandwidth_measured_by": winner,
        "limit_ms": 1e3 * 4 * FLOATS_MOVED * parameters(shapes) / rate,
    }


def step_costs(shapes: Sequence[Shape], name: str) -> dict[str, float | None]:
    """Measure the time and the peak memory of an optimizer's first step, and of a later step.

    A peak is `None` where the system does not report it. Percentages are of the size of the
    weights.

    Args:
        shapes: the shapes of the weights.
        name: an optimizer, one of `modes.OPTIMIZERS_WITH_COSTS`.
    """
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
