"""Times whole training steps with SNGM against other optimizers, on random data.

The optimizers of a task are interleaved in one process, in short calls of `fit`.

    python benchmarks/train_step.py             everything, half an hour
    python benchmarks/train_step.py --quick     a smoke run
    python benchmarks/train_step.py --report    the table once more
"""

import argparse
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers
from tqdm import tqdm

import commandline
from contestants import KERAS
from fitting import fit_sampler
from jobs import run_in_new_process
from report import print_rows, spread, training
from timing import machine, paired_ratio, quartiles_ms, sample_interleaved

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
from common import models
from common.arguments import parsed_on

OPTIMIZERS = ("SNGM", "SGD", "Adam")
# The `jit_compile` of each mode.
MODES = {"graph": False, "xla": True}


class Task(NamedTuple):
    """A model, and one batch of data to train it with."""

    make_model: Callable[[], keras.Model]
    inputs: np.ndarray
    labels: np.ndarray
    steps_of_a_fit: int
    """Timed steps in a call of `fit`. Short steps need many, or the start of `fit` would show."""


def resnet20(quick: bool) -> Task:
    """Return the task to train a ResNet-20 on 32x32 images."""
    batch_size = 16 if quick else 512
    generator = np.random.default_rng(0)
    return Task(
        lambda: models.resnet((32, 32, 3), 10),
        generator.normal(size=(batch_size, 32, 32, 3)).astype("float32"),
        generator.integers(10, size=batch_size),
        steps_of_a_fit=2,
    )


def transformer(quick: bool, tokens: int = 5_000, length: int = 64, width: int = 128) -> Task:
    """Return the task to train a transformer of three layers to predict the next token."""
    batch_size = 4 if quick else 32
    text = np.random.default_rng(0).integers(tokens, size=(batch_size, length + 1))

    return Task(
        lambda: models.transformer(tokens, length, width),
        text[:, :-1],
        text[:, 1:],
        steps_of_a_fit=5,
    )


def embedding(quick: bool, ids: int = 20, width: int = 32) -> Task:
    """Return the task to train a large embedding table and a small network on top of it.

    The gradient of the table is sparse.
    """
    rows, batch_size = (1_000, 64) if quick else (100_000, 1_024)
    generator = np.random.default_rng(0)

    def make_model() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((ids,), dtype="int32"),
                layers.Embedding(rows, width),
                layers.Flatten(),
                layers.Dense(128, "relu"),
                layers.Dense(64, "relu"),
                layers.Dense(2),
            ]
        )

    return Task(
        make_model,
        generator.integers(rows, size=(batch_size, ids)),
        generator.integers(2, size=batch_size),
        steps_of_a_fit=20,
    )


TASKS = {"resnet20": resnet20, "transformer": transformer, "embedding": embedding}


def train_times(name: str, mode: str, seconds: float, quick: bool) -> dict[str, Any]:
    """Time the training step of a task with each of the optimizers, interleaved.

    Args:
        name: a key of `TASKS`.
        mode: a key of `MODES`.
        seconds: the time to measure for, all optimizers together.
        quick: whether to train on small batches.
    """
    task = TASKS[name](quick)
    samplers = {}
    for optimizer in OPTIMIZERS:
        model = task.make_model()
        model.compile(
            KERAS[optimizer](),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=MODES[mode],
        )
        samplers[optimizer] = fit_sampler(model, (task.inputs, task.labels), task.steps_of_a_fit)
    samples = sample_interleaved(samplers, seconds, warm_up=1)
    return {
        "parameters": model.count_params(),
        "batch_size": len(task.inputs),
        "times_ms": {optimizer: quartiles_ms(values) for optimizer, values in samples.items()},
        "samples": {optimizer: len(values) for optimizer, values in samples.items()},
        "sgd_over_sngm": paired_ratio(samples["SGD"], samples["SNGM"]),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all tasks that were asked for, and add them to the results of earlier runs."""
    path = arguments.output / "train_step.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    results["machine"] = machine()
    jobs = [(task, mode) for task in arguments.tasks for mode in MODES]
    with tqdm(jobs, unit="job") as bar:
        for task, mode in bar:
            bar.set_description(f"{task}, {mode}")
            try:
                measured = run_in_new_process(
                    train_times, task, mode, arguments.seconds, arguments.quick
                )
            except Exception as error:  # The other jobs can still be done.
                tqdm.write(f"{task}, {mode} failed:\n{''.join(traceback.format_exception(error))}")
                continue
            results["steps"].setdefault(task, {})[mode] = measured
            arguments.output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def print_table(results: dict[str, Any]) -> None:
    print("\nA training step, medians, others as multiples of SNGM\n")
    print_rows(training(results))
    print("\nSGD / SNGM within a round: median (quartiles)\n")
    for task, modes in results["steps"].items():
        for mode, measured in modes.items():
            print(f"{task}, {mode}: {spread(measured['sgd_over_sngm'])}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = commandline.parser(__doc__, quick="small batches, a second each")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--seconds", type=float, help="for every task and mode, default 40 (quick: 1)"
    )
    arguments = parsed_on("tensorflow", parser, argv)
    if arguments.seconds is None:
        arguments.seconds = 1.0 if arguments.quick else 40.0
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.report:
        results = json.loads((arguments.output / "train_step.json").read_text())
    else:
        results = run(arguments)
    print_table(results)


if __name__ == "__main__":
    main()
