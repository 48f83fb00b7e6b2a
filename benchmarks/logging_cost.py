"""Times what GradientNormLogger adds to the training steps of a ResNet-20.

All variants are interleaved in one process, in short calls of `fit`. The time to fetch and
write values at the end of an epoch counts as part of the epoch's steps. A step at batch 128
takes so long that noise hides what a logger adds. So the loggers are also timed on batches of
one tiny image, where the same variables are updated and little else is computed.

    python benchmarks/logging_cost.py             twenty minutes
    python benchmarks/logging_cost.py --quick     a smoke run
    python benchmarks/logging_cost.py --report    the table once more
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import commandline
from contestants import KERAS
from jobs import run_in_new_process
from keras_sngm import GradientNormLogger
from report import number, print_rows, spread
from timing import Sampler, machine, quartiles, quartiles_ms, sample_interleaved

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
from common import models
from common.arguments import parsed_on

BATCH = 128
STEPS = {"batch": 3, "tiny": 100}
LOGGERS: dict[str, dict[str, Any]] = {
    "default": {},
    "`per_variable=True`": {"per_variable": True},
    "`per_variable=True`, TensorBoard and CSV": {"per_variable": True, "files": True},
    "everything, every 10th step": {
        "per_variable": True,
        "files": True,
        "update_ratio": True,
        "log_every": 10,
        "histogram_every": 10,
    },
}
VARIANTS = [
    ("SNGM", None),
    *(("SNGM", logger) for logger in LOGGERS),
    ("SGD", None),
    ("SGD", "default"),
]


def name_of(optimizer: str, logger: str | None) -> str:
    """Return the name of a variant, by which results are stored."""
    return f"{optimizer}, {logger or 'no logger'}"


class _Clock(keras.callbacks.Callback):
    """Callback that times an epoch from its second step on, logging at its end included.

    It must be listed after the logger, whose callbacks then end before this one's.
    """

    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.begin = 0.0
        self.end = 0.0

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if batch == 1:
            self.begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.end = time.perf_counter()


def sampler(optimizer: str, logger: str | None, size: str, folder: str) -> Sampler:
    """Return a sampler that trains one epoch and gives its seconds per step, without the first.

    Args:
        optimizer: a key of `contestants.KERAS`.
        logger: a key of `LOGGERS`, or `None` to train without a logger.
        size: "tiny" for batches of one 4x4 image, or "batch".
        folder: the folder that the logger writes to.
    """
    count = 1 if size == "tiny" else BATCH
    side = 4 if size == "tiny" else 32
    generator = np.random.default_rng(0)
    images = generator.normal(size=(count, side, side, 3)).astype("float32")
    labels = generator.integers(10, size=count)
    model = models.resnet(images.shape[1:], 10)
    model.compile(KERAS[optimizer](), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    dataset = tf.data.Dataset.from_tensors((images, labels)).repeat()
    callbacks = [] if logger is None else [make_logger(logger, f"{folder}/{optimizer} {logger}")]

    def sample() -> list[float]:
        clock = _Clock()
        model.fit(
            dataset,
            steps_per_epoch=STEPS[size] + 1,
            shuffle=False,
            verbose=0,
            callbacks=[*callbacks, clock],
        )
        return [(clock.end - clock.begin) / STEPS[size]]

    return sample


def make_logger(name: str, folder: str) -> GradientNormLogger:
    """Return the logger of this name in `LOGGERS`; its files, if any, are in `folder`."""
    arguments = dict(LOGGERS[name])
    if arguments.pop("files", False):
        arguments |= {"log_dir": folder, "filename": f"{folder}/log.csv"}
    return GradientNormLogger(**arguments)


def sample_variants(size: str, seconds: float) -> dict[str, list[float]]:
    """Time all variants, interleaved, and return their samples by variant.

    The n-th sample of every variant was measured in the same round.
    """
    with tempfile.TemporaryDirectory() as folder:
        samplers = {name_of(*v): sampler(*v, size, folder) for v in VARIANTS}
        return sample_interleaved(samplers, seconds, warm_up=1)


def costs(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return what each logger adds to a step, in milliseconds and in percent.

    Each sample is compared with the sample of the same round of the same optimizer without a
    logger.
    """
    result: dict[str, Any] = {}
    for optimizer, logger in VARIANTS:
        step_times = np.array(samples[name_of(optimizer, logger)])
        without = np.array(samples[name_of(optimizer, None)])
        result[name_of(optimizer, logger)] = {
            "step_ms": quartiles_ms(step_times),
            "added_ms": quartiles_ms(step_times - without),
            "added_percent": quartiles(100 * (step_times / without - 1)),
            "samples": len(step_times),
        }
    return result


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the README's table of what logging costs."""
    rows = [["optimizer", "`GradientNormLogger`", "adds, ms", "% of a step", "% measured in steps"]]
    for optimizer, logger in VARIANTS:
        if logger is None:
            continue
        name = name_of(optimizer, logger)
        added = results["tiny"][name]["added_ms"][1]
        step = results["batch"][name_of(optimizer, None)]["step_ms"][1]
        rows.append(
            [
                optimizer,
                logger,
                number(added),
                number(100 * added / step),
                spread(results["batch"][name]["added_percent"]),
            ]
        )
    return rows


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all variants, write the results to `logging_cost.json` and return them."""
    results: dict[str, Any] = {"machine": machine()}
    for size, share in (("tiny", 0.1), ("batch", 0.9)):
        print(f"Measuring: {size} ...", flush=True)
        results[size] = costs(run_in_new_process(sample_variants, size, share * arguments.seconds))
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "logging_cost.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = commandline.parser(__doc__, quick="a few seconds per variant")
    parser.add_argument("--seconds", type=float, help="of measuring, default 1000 (quick: 1)")
    arguments = parsed_on("tensorflow", parser, argv)
    if arguments.seconds is None:
        arguments.seconds = 1.0 if arguments.quick else 1000.0
    if arguments.report:
        results = json.loads((arguments.output / "logging_cost.json").read_text())
    else:
        results = run(arguments)
    print_rows(table(results))


if __name__ == "__main__":
    main()
