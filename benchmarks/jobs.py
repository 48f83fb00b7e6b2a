"""What is measured in a process of its own, and how such a process is started."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import bandwidth
from memory import peak_of
from modes import function_step, samplers
from shapes import Shape, parameters
from timing import interleaved, paired_ratio, quartiles_ms

FLOATS_MOVED = 6
"""Per parameter: the gradient is read twice, momentum and weight are read and written."""


def alone(job: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a job in a new process, so that its memory and its devices are its own."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(job, *arguments).result()


def step_times(
    mode: str, shapes: Sequence[Shape], seconds: float, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Times of all contestants of a mode; in graphs also the limit set by memory."""
    limit = memory_limit(shapes) if mode == "function" else {}
    samples = interleaved(samplers(mode, shapes, names), seconds)
    result = {
        "parameters": parameters(shapes),
        "variables": len(shapes),
        **limit,
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
    """The least time in which a step can move its data through memory."""
    rate, winner = bandwidth.measured()
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
