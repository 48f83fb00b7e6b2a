"""Watches a conv net and a small transformer learn with SNGM and with momentum SGD.

Everything that `GradientNormLogger` can log is switched on. The data need no download:
MNIST-1D is generated, and the text is the help that comes with Python.

    python examples/gradient_norms.py            a few minutes
    python examples/gradient_norms.py --quick    a smoke run
    tensorboard --logdir results/gradient_norms/tensorboard

Both optimizers get the same batches, split into micro-batches, from whose differences SNGM
estimates the gradient noise scale. This shows what can be logged. It does not compare the
optimizers: the learning rates of the conv net are those of large_batch.py, and the learning
rates of the transformer were not tuned.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from tqdm import tqdm

from common import data, models
from common.progress import Advance
from keras_sngm import SNGM, GradientNormLogger

MICRO_BATCHES = 4
MOST_LAYERS = 8


class Task(NamedTuple):
    """A training job: the data, the model, and the settings of training.

    Attributes:
        pairs: pairs of an input and a label.
        make_model: returns a new model, whose outputs are logits.
        micro_batch: the number of samples in a micro-batch.
        epochs: the number of epochs.
        depth: the number of parts of a variable's path that name its layer.
        rates: the learning rate of each optimizer.
    """

    pairs: tf.data.Dataset
    make_model: Callable[[], keras.Model]
    micro_batch: int
    epochs: int
    depth: int
    rates: dict[str, float]


def conv_net(quick: bool) -> Task:
    """Return the task to train a conv net on MNIST-1D."""
    task = data.mnist1d(quick)
    return Task(
        task.train,
        lambda: models.for_input(task.input_shape, task.classes),
        micro_batch=25 if quick else 250,
        epochs=2 if quick else 60,
        depth=2,
        rates={"SNGM": 0.5, "SGD": 0.35},
    )


def transformer(quick: bool, length: int = 64) -> Task:
    """Return the task to train a transformer on text, to predict the next character.

    Args:
        quick: whether to use little data.
        length: the number of characters in a sample.
    """
    text = data.python_manual(length, pieces=64 if quick else 4096)
    return Task(
        text.pairs,
        lambda: models.transformer(text.characters, length, width=64, blocks=2),
        micro_batch=4 if quick else 32,
        epochs=2 if quick else 15,
        depth=1,
        rates={"SNGM": 0.25, "SGD": 0.35},
    )


TASKS = {"conv net": conv_net, "transformer": transformer}


def sngm(rate: Any, task: Task) -> keras.optimizers.Optimizer:
    return SNGM(
        rate,
        gradient_accumulation_steps=MICRO_BATCHES,
        noise_scale_batch_size=task.micro_batch,
        noise_scale_momentum=0.95,
    )


def sgd(rate: Any, task: Task) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(rate, momentum=0.9, gradient_accumulation_steps=MICRO_BATCHES)


KINDS = {"SNGM": sngm, "SGD": sgd}


def train(name: str, task: Task, output: pathlib.Path, bar: tqdm) -> dict[str, list[dict]]:
    """Train on a task with each optimizer; return what was logged of each update, by optimizer."""
    samples, epochs = int(task.pairs.cardinality()), task.epochs
    updates = samples // (task.micro_batch * MICRO_BATCHES)
    batches = (
        task.pairs.cache()
        .shuffle(samples, seed=0)
        .batch(task.micro_batch, drop_remainder=True)
        .take(updates * MICRO_BATCHES)
        .prefetch(tf.data.AUTOTUNE)
    )
    logged = {}
    for kind, make in KINDS.items():
        keras.utils.set_random_seed(0)
        keras.backend.clear_session()  # Layers then get the same names each time.
        model = task.make_model()
        # Learning-rate schedules count micro-batches, not updates.
        schedule = keras.optimizers.schedules.PolynomialDecay(
            task.rates[kind], epochs * updates * MICRO_BATCHES, end_learning_rate=0.0
        )
        model.compile(
            make(schedule, task),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        filename = output / f"{name} {kind}.jsonl"
        logger = GradientNormLogger(
            log_dir=output / "tensorboard" / name / kind,
            filename=filename,
            per_variable=task.depth,
            update_ratio=True,
            histogram_every=max(1, epochs * updates // 20),
            on_nonfinite="stop",
        )
        bar.set_description(f"{name}, {kind}")
        history = model.fit(
            batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[logger, Advance(bar)]
        ).history
        tqdm.write(f"{name}, {kind}: training loss {history['loss'][-1]:.3f}")
        logged[kind] = [json.loads(line) for line in filename.read_text().splitlines()]
    return logged


def draw(logged: dict[str, dict[str, list[dict]]], path: pathlib.Path) -> None:
    """Draw norms, ratios and noise scales by update, a row of panels for each task."""
    figure, rows = plt.subplots(
        len(logged), 4, figsize=(15, 3.4 * len(logged)), layout="constrained", squeeze=False
    )
    for (task, runs), (norms, layers, ratios, noise) in zip(logged.items(), rows, strict=True):
        for kind, lines in runs.items():
            plot(norms, lines, "grad_norm", kind)
            plot(ratios, lines, "update_ratio", kind)
        plot_layers(layers, runs["SNGM"])
        plot(noise, runs["SNGM"], "gradient_noise_scale", "SNGM")
        norms.set(title=f"{task}: norm of the gradient", yscale="log")
        layers.set(title="of its layers, SNGM", yscale="log")
        ratios.set(title="change of the weights / weights", yscale="log")
        noise.set(title="gradient noise scale, samples", yscale="log")
        for panel in (norms, layers, ratios, noise):
            panel.set_xlabel("update")
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot(panel: Axes, lines: list[dict], key: str, label: str) -> None:
    """Draw one logged value against the number of the update."""
    values = np.array([line[key] for line in lines])
    panel.plot([line["step"] for line in lines], values, label=label, lw=1)


def plot_layers(panel: Axes, lines: list[dict]) -> None:
    """Draw the gradient norms of the `MOST_LAYERS` layers with the largest mean norms."""
    keys = [key for key in lines[0] if key.startswith("grad_norm/")]
    keys.sort(key=lambda key: -np.mean([line[key] for line in lines]))
    for key in keys[:MOST_LAYERS]:
        plot(panel, lines, key, key.rpartition("/")[2])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little data, two epochs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/gradient_norms")
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tasks = {name: TASKS[name](arguments.quick) for name in arguments.tasks}
    epochs = len(KINDS) * sum(task.epochs for task in tasks.values())
    with tqdm(total=epochs, unit="epoch", dynamic_ncols=True) as bar:
        logged = {name: train(name, task, arguments.output, bar) for name, task in tasks.items()}
    picture = arguments.output / "gradient_norms.png"
    draw(logged, picture)
    print(f"\nWrote {picture}. To see more: tensorboard --logdir {arguments.output}/tensorboard")


if __name__ == "__main__":
    main()
