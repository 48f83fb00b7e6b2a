"""Times the step of SNGM against other optimizers, with random gradients.

Every model and mode is measured in its own process, in which the compared optimizers are
interleaved. A process imports only one backend: if Keras runs on TensorFlow, the steps of
PyTorch and of Optax are taken in separate processes. The bandwidth of the memory is also measured
in separate processes, once with each library.

    python benchmarks/step_time.py                    everything, about an hour
    python benchmarks/step_time.py --quick            a smoke run
    python benchmarks/step_time.py --models resnet50 --modes eager function
    python benchmarks/step_time.py --report           tables and picture once more
    KERAS_BACKEND=jax python benchmarks/step_time.py  with JAX, or torch

Results of each backend are in one file, those of steps on an accelerator in another.
"""

import argparse
import json
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from tqdm import tqdm

import commandline
import memory
import report
from contestants import contestants_not_installed
from jobs import device, memory_limit, run_in_new_process, step_costs, step_times
from modes import CONTESTANTS, OPTIMIZERS_WITH_COSTS, accelerator, contestants
from shapes import MODELS, TABLE, Shape, equal_vectors, parameters
from timing import machine

OPTIMIZERS_BY_SIZE = ("SNGM", "SGD")


class Job(NamedTuple):
    """A measurement: its title, a function that measures, and one that stores the result."""

    title: str
    measure: Callable[[], Any]
    store: Callable[[Any], None]


def step_jobs(results: dict[str, Any], arguments: argparse.Namespace) -> list[Job]:
    """Return the jobs that time steps, one for each model and mode."""
    return [
        Job(
            f"{model}, {mode}",
            lambda model=model, mode=mode: model_times(MODELS[model], mode, arguments.seconds),
            lambda result, model=model, mode=mode: (
                results["steps"].setdefault(model, {}).update({mode: result})
            ),
        )
        for model in arguments.models
        for mode in arguments.modes
    ]


def model_times(shapes: Sequence[Shape], mode: str, seconds: float) -> dict[str, Any]:
    """Time all contestants of a mode.

    The contestants of this backend are interleaved in one process. Each contestant of another
    backend has its own process.
    """
    result = measure_times(mode, shapes, seconds)
    for name, backend in contestants_of_other_backends(mode).items():
        # The step of another library is the same in all modes, and every backend has `function`.
        job = (step_times, "function", shapes, seconds / 4, [name])
        own = run_in_new_process(*job, backend=backend)
        for key in ("times_ms", "samples"):
            result[key].update(own[key])
    return result


def contestants_of_other_backends(mode: str) -> dict[str, str]:
    """Return the contestants of a mode whose steps other backends take, with these backends.

    If steps run on an accelerator, contestants whose library does not use one are left out.
    """
    return {
        name: backend
        for name, backend in contestants(mode).items()
        if backend != keras.backend.backend()
        and (device() is None or run_in_new_process(accelerator, backend=backend))
    }


def measure_times(
    mode: str, shapes: Sequence[Shape], seconds: float, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Time contestants of this backend in a new process.

    In mode `function`, also measure the time in which memory could move the data of a step.
    """
    limit = memory_limit(shapes) if mode == "function" else {}
    return {**limit, **run_in_new_process(step_times, mode, shapes, seconds, names)}


def cost_jobs(results: dict[str, Any], arguments: argparse.Namespace) -> list[Job]:
    """Return the jobs that measure the time and the memory of first steps."""
    return [
        Job(
            f"{model}, first step of {name}",
            lambda model=model, name=name: run_in_new_process(step_costs, MODELS[model], name),
            lambda result, model=model, name=name: (
                results["costs"].setdefault(model, {}).update({name: result})
            ),
        )
        for model in arguments.models
        for name in OPTIMIZERS_WITH_COSTS
    ]


def growth_jobs(results: dict[str, Any], arguments: argparse.Namespace) -> list[Job]:
    """Return the jobs that time steps by number of parameters and by number of variables."""
    series = {
        "parameters": [equal_vectors(total, 10) for total in arguments.parameters],
        "variables": [equal_vectors(10**6, variables) for variables in arguments.variables],
    }
    return [
        Job(
            f"{parameters(shapes):,} parameters in {len(shapes):,} variables",
            lambda shapes=shapes: growth_point(shapes, arguments.seconds),
            lambda result, of=of: _add_point(results["growth"][of], of, result),
        )
        for of, points in series.items()
        for shapes in points
    ]


def _add_point(points: list[dict[str, Any]], of: str, result: dict[str, Any] | None) -> None:
    """Insert a result into points sorted by `of`; it replaces a point of the same size."""
    if result:
        points[:] = [point for point in points if point[of] != result[of]] + [result]
        points.sort(key=lambda point: point[of])


def growth_point(shapes: Sequence[Shape], seconds: float) -> dict[str, Any] | None:
    """Time SNGM and SGD: interleaved if memory allows, otherwise one after the other.

    Returns `None` if there is not even memory for one of them.
    """
    if _fits(shapes, arrays=7):
        return measure_times("function", shapes, seconds, OPTIMIZERS_BY_SIZE)
    if not _fits(shapes, arrays=5):
        return None
    apart = [measure_times("function", shapes, seconds, [name]) for name in OPTIMIZERS_BY_SIZE]
    return {**apart[0], "times_ms": {k: v for one in apart for k, v in one["times_ms"].items()}}


def table_jobs(results: dict[str, Any], arguments: argparse.Namespace) -> list[Job]:
    """Return the jobs that time steps on one large embedding table."""

    def measure(name: str) -> dict[str, Any] | None:
        if not _fits(TABLE, arrays=5):
            return None
        return measure_times("function", TABLE, arguments.seconds, [name])

    return [
        Job(
            f"one table, {name}",
            lambda name=name: measure(name),
            lambda result, name=name: results["table"].update({name: result}),
        )
        for name in OPTIMIZERS_BY_SIZE
    ]


def _fits(shapes: Sequence[Shape], arrays: int) -> bool:
    """Return whether free memory holds `arrays` float32 copies of the weights."""
    return 4 * arrays * parameters(shapes) < memory.available()


def run(arguments: argparse.Namespace) -> pathlib.Path:
    """Measure all that was asked for, and add it to the results of earlier runs.

    The file is written after every job, so that an interrupted run loses one job only.

    Returns:
        The path of the file with the results.
    """
    results: dict[str, Any] = {
        "steps": {},
        "costs": {},
        "growth": {"parameters": [], "variables": []},
        "table": {},
    }
    path = arguments.output / f"{_results_prefix()}{'_accelerator' if device() else ''}.json"
    if path.exists():
        results = json.loads(path.read_text())
    results["machine"] = {**machine(), "accelerator": device()}
    jobs = step_jobs(results, arguments) + growth_jobs(results, arguments)
    if arguments.costs:
        jobs += cost_jobs(results, arguments)
    if arguments.table:
        jobs += table_jobs(results, arguments)
    for name, library in contestants_not_installed().items():
        print(f"{name} is left out: {library} is not installed")
    with tqdm(jobs, unit="job") as bar:
        for job in bar:
            bar.set_description(job.title)
            try:
                result = job.measure()
            except Exception as error:  # The other jobs can still be done.
                tqdm.write(f"{job.title} failed:\n" + "".join(traceback.format_exception(error)))
                result = None
            else:
                if result is None:
                    tqdm.write(f"{job.title}: left out, too little memory")
            job.store(result)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _results_prefix() -> str:
    """Return the beginning of the names of the files with this backend's results."""
    return f"step_time_{keras.backend.backend()}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = commandline.parser(__doc__, quick="one small model, a second each")
    parser.add_argument("--models", nargs="*", choices=MODELS, help="default all (quick: resnet20)")
    parser.add_argument("--modes", nargs="*", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--seconds", type=float, help="for every model and mode, default 10 (quick: 1)"
    )
    for name, what in (
        ("costs", "the first step and the memory"),
        ("table", "one table of 10^9 parameters"),
    ):
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, help=f"{what}, default yes"
        )
    parser.add_argument(
        "--parameters", nargs="*", type=int, help="in 10 variables, default 10^4 to 10^9"
    )
    parser.add_argument(
        "--variables", nargs="*", type=int, help="of 10^6 parameters, default 10 to 10^4"
    )
    arguments = parser.parse_args(argv)
    usual = {
        "models": list(MODELS),
        "seconds": 10.0,
        "costs": True,
        "table": True,
        "parameters": [10**exponent for exponent in range(4, 10)],
        "variables": [10, 100, 1_000, 10_000],
    }
    quick = {
        "models": ["resnet20"],
        "seconds": 1.0,
        "costs": True,
        "table": False,
        "parameters": [],
        "variables": [],
    }
    for name, value in (quick if arguments.quick else usual).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.report:
        paths = sorted(arguments.output.glob(f"{_results_prefix()}*.json"))
    else:
        paths = [run(arguments)]
    for path in paths:
        results = json.loads(path.read_text())
        report.print_tables(results)
        report.draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
