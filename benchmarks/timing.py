"""Timing of contestants against each other: all of them in every round, in random order."""

import gc
import importlib.metadata
import os
import pathlib
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

Sampler = Callable[[], list[float]]
"""Function that takes some steps and returns the seconds of each."""

PACKAGES = ("keras-sngm", "tensorflow", "keras", "numpy", "jax", "optax", "torch")


def timed_sampler(call: Callable[[], object], steps: int = 1) -> Sampler:
    """Return a sampler that times one call of `call`, in seconds per step.

    An untimed call before it fills the caches again, which other contestants have used since.

    Args:
        call: takes `steps` steps.
        steps: the number of steps in a call.
    """

    def sample() -> list[float]:
        call()
        begin = time.perf_counter()
        call()
        return [(time.perf_counter() - begin) / steps]

    return sample


def sample_interleaved(
    samplers: Mapping[str, Sampler],
    seconds: float,
    warm_up: int = 2,
    at_least: int = 5,
    at_most: int = 1_000,
) -> dict[str, list[float]]:
    """Call all samplers once per round, in random order, until the time is over.

    Args:
        samplers: a sampler for each contestant.
        seconds: the time after which no new round begins.
        warm_up: the number of untimed calls of each sampler before the first round.
        at_least: the least number of rounds, however long they take.
        at_most: the greatest number of rounds.

    Returns:
        The samples by contestant. The n-th samples of all contestants are from the same round
        if all samplers return equally many.
    """
    for sampler in samplers.values():
        for _ in range(warm_up):
            sampler()
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    generator = random.Random(0)
    end = time.perf_counter() + seconds
    with _no_collection() as collect:
        for done in range(at_most):
            if done >= at_least and time.perf_counter() > end:
                break
            collect()
            generator.shuffle(order)
            for name in order:
                samples[name] += samplers[name]()
    return samples


@contextmanager
def _no_collection() -> Iterator[Callable[[], int]]:
    """Turn off automatic garbage collection; yield a function that collects on request."""
    gc.collect()
    gc.freeze()  # Collections on request skip frozen objects, so that they are fast.
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def fastest_call(call: Callable[[], object], calls: int) -> float:
    """Return the seconds of the fastest of `calls` timed calls."""
    call()
    sampler = timed_sampler(call)
    return min(sampler()[0] for _ in range(calls))


def quartiles(values: Iterable[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return [float(q) for q in np.percentile(list(values), [25, 50, 75])]


def quartiles_ms(seconds: Iterable[float]) -> list[float]:
    """Return the quartiles of times in seconds, in milliseconds."""
    return [1e3 * q for q in quartiles(seconds)]


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the quartiles of the ratio of two contestants within a round."""
    return quartiles(a / b for a, b in zip(numerators, denominators, strict=True))


def machine() -> dict[str, object]:
    """Describe the machine and the installed packages that times are measured with."""
    return {
        "processor": _processor(),
        "cores": _cores(),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _cores() -> int | None:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _versions() -> dict[str, str]:
    """Return the versions of those of `PACKAGES` that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
