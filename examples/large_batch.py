"""Trains one network with SNGM, momentum SGD and LAMB at a large batch.

Momentum SGD at a small batch is the reference. Every method trains for the same
number of epochs, at the learning rate that the large-batch study found best for it on
validation data. The study, `python -m study`, compares more methods and searches their rates.

    python examples/large_batch.py                       the main job
    python examples/large_batch.py --quick               a smoke run
    python examples/large_batch.py --suggest             at rates that are suggested, not tuned
    python examples/large_batch.py --dataset cifar10     a ResNet-20 on images
    python examples/large_batch.py --strategy mirrored   on all visible devices
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from common import data, models
from common.arguments import parsed_on, with_defaults
from common.progress import Advance
from keras_sngm import GradientNormLogger, suggest_learning_rate
from study import methods

WEIGHT_DECAY = 1e-4


class Method(NamedTuple):
    """A method at the large or the small batch size, with its tuned learning rate.

    Attributes:
        name: a key of `study.methods.METHODS`.
        large_batch: whether it trains at the large batch size.
        tuned: the k for which the learning rate 2^(k/2) was best on the validation data of
            MNIST-1D.
        start: the learning rate at which a suggestion begins: Keras' default for the method,
            `None` for SNGM, which has a formula.
    """

    name: str
    large_batch: bool
    tuned: int
    start: float | None

    @property
    def tuned_rate(self) -> float:
        """Return the learning rate that the study found best."""
        return 2.0 ** (self.tuned / 2)


METHODS = (
    Method("SNGM", True, tuned=-2, start=None),
    Method("momentum SGD", True, tuned=-3, start=0.01),
    Method("LAMB", True, tuned=-8, start=0.001),
    Method("momentum SGD", False, tuned=-4, start=0.01),
)


class Run(NamedTuple):
    """Settings and results of one training run."""

    method: str
    batch_size: int
    learning_rate: float
    seed: int
    steps: int
    seconds: float
    test_accuracy: float
    optimizer_floats_per_parameter: float
    val_accuracy: list[float]
    grad_norm: list[float]


class Trainer:
    """A trainer of new models on one task, which advances one progress bar.

    Args:
        task: the data to train on.
        epochs: the number of epochs of each run.
        strategy: the strategy that models are trained under.
        bar: a progress bar that counts epochs.
    """

    def __init__(
        self, task: data.Task, epochs: int, strategy: tf.distribute.Strategy, bar: tqdm
    ) -> None:
        self.task = task
        self.epochs = epochs
        self.strategy = strategy
        self.bar = bar
        self.train_size = int(task.train.cardinality())

    def suggested_rate(self, method: Method, batch_size: int) -> float:
        """Return the learning rate that short trainings of a new model suggest."""
        self.bar.set_description(f"{method.name}, batch {batch_size}, learning rate")
        keras.utils.set_random_seed(0)
        return suggest_learning_rate(
            self._model(method, 1.0),
            self._batches(batch_size),
            epochs=self.epochs,
            start=method.start,
            verbose=0,
        ).learning_rate

    def run(self, method: Method, batch_size: int, learning_rate: float, seed: int) -> Run:
        """Train a new model and evaluate it on test data."""
        self.bar.set_description(f"{method.name}, batch {batch_size}, lr {learning_rate:.4g}")
        keras.utils.set_random_seed(seed)
        steps = self.epochs * (self.train_size // batch_size)
        schedule = keras.optimizers.schedules.PolynomialDecay(
            learning_rate, steps, end_learning_rate=0.0, power=methods.DECAY_POWER
        )
        model = self._model(method, schedule)
        begin = time.perf_counter()
        history = model.fit(
            self._batches(batch_size),
            epochs=self.epochs,
            validation_data=_evaluation_batches(self.task.validation),
            callbacks=[GradientNormLogger(), Advance(self.bar)],
            shuffle=False,  # `_batches` shuffles
            verbose=0,
        ).history
        seconds = time.perf_counter() - begin
        _, accuracy = model.evaluate(_evaluation_batches(self.task.test), verbose=0)
        return Run(
            method.name,
            batch_size,
            learning_rate,
            seed,
            steps,
            seconds,
            accuracy,
            _floats(model.optimizer.variables) / _floats(model.trainable_variables),
            history["val_accuracy"],
            history["grad_norm"],
        )

    def _model(self, method: Method, learning_rate: Any) -> keras.Model:
        """Return a new compiled model.

        Args:
            method: the method that it is trained with.
            learning_rate: a number or a schedule.
        """
        with self.strategy.scope():
            model = models.for_input(self.task.input_shape, self.task.classes)
            model.compile(
                optimizer=methods.METHODS[method.name](learning_rate, WEIGHT_DECAY),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
        return model

    def _batches(self, batch_size: int) -> tf.data.Dataset:
        """Return the shuffled batches of an epoch, all of the same size."""
        # A smaller batch at the end would weigh as much as a whole one in SNGM.
        train = self.task.train.cache().shuffle(min(self.train_size, 50_000))
        return train.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def _evaluation_batches(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.batch(1_000).cache()


def _floats(variables: Sequence[keras.Variable]) -> int:
    """Return the number of elements of all variables together."""
    return sum(math.prod(v.shape) for v in variables)


def compare(trainer: Trainer, arguments: argparse.Namespace) -> list[Run]:
    """Train with every method at its tuned or a suggested learning rate, once for each seed."""
    runs = []
    for method in METHODS:
        batch_size, rate = _batch_size(method, arguments), method.tuned_rate
        if arguments.suggest:
            rate = trainer.suggested_rate(method, batch_size)
            trainer.bar.write(
                f"{method.name}, batch {batch_size:,}: learning rate {rate:.3g} suggested, "
                f"{method.tuned_rate:.3g} tuned"
            )
        runs += [trainer.run(method, batch_size, rate, seed) for seed in range(arguments.seeds)]
    return runs


def _batch_size(method: Method, arguments: argparse.Namespace) -> int:
    return arguments.batch_size if method.large_batch else arguments.small_batch_size


def grouped(runs: Sequence[Run], *fields: str) -> dict[tuple, list[Run]]:
    """Group runs by the values of the named fields."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, field) for field in fields), []).append(run)
    return groups


def print_comparison(runs: Sequence[Run]) -> None:
    print(
        "\n| method | batch | learning rate | test accuracy, % | steps "
        "| optimizer floats per parameter | seconds per run |\n|---|---|---|---|---|---|---|"
    )
    for (name, batch_size), group in grouped(runs, "method", "batch_size").items():
        print(
            f"| {name} | {batch_size:,} | {group[0].learning_rate:.4g} "
            f"| {_spread([100 * run.test_accuracy for run in group])} | {group[0].steps:,} "
            f"| {group[0].optimizer_floats_per_parameter:.1f} "
            f"| {np.mean([run.seconds for run in group]):.1f} |"
        )


def _spread(values: Sequence[float]) -> str:
    """Format mean and standard deviation, or the mean alone of a single value."""
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def draw(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Draw validation accuracy and gradient norm by epoch: means, with bands that span seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, batch_size), group in grouped(runs, "method", "batch_size").items():
        for panel, field, scale in zip(
            panels, ("val_accuracy", "grad_norm"), (100, 1), strict=True
        ):
            curves = scale * np.array([getattr(run, field) for run in group])
            epochs = np.arange(1, curves.shape[1] + 1)
            (line,) = panel.plot(epochs, curves.mean(0), label=f"{name}, batch {batch_size:,}")
            panel.fill_between(
                epochs, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2, lw=0
            )
    panels[0].set(xlabel="epoch", ylabel="validation accuracy, %")
    panels[1].set(xlabel="epoch", ylabel="gradient norm, mean over the epoch", yscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save(runs: Sequence[Run], arguments: argparse.Namespace, path: pathlib.Path) -> None:
    """Write the command line and all runs to a JSON file."""
    settings = {key: str(value) for key, value in vars(arguments).items()}
    path.write_text(
        json.dumps({"settings": settings, "runs": [run._asdict() for run in runs]}, indent=1)
    )


def strategy_named(name: str) -> tf.distribute.Strategy:
    """Return the default strategy for "none", else one over all GPUs, or all CPU devices."""
    if name == "none":
        return tf.distribute.get_strategy()
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        default="mnist1d",
        help="mnist1d, or any image-classification dataset of tensorflow-datasets",
    )
    parser.add_argument("--strategy", default="none", choices=["none", "mirrored"])
    parser.add_argument("--quick", action="store_true", help="little data, two epochs, one seed")
    parser.add_argument(
        "--suggest", action="store_true", help="use suggested learning rates instead of tuned ones"
    )
    parser.add_argument("--batch-size", type=int, help="default 1000 (quick: 100)")
    parser.add_argument("--small-batch-size", type=int, help="default 128 (quick: 32)")
    parser.add_argument("--epochs", type=int, help="default 60 (quick: 2)")
    parser.add_argument("--seeds", type=int, help="default 3 (quick: 1)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/large_batch"))
    return with_defaults(
        parsed_on("tensorflow", parser, argv),
        usual={"batch_size": 1000, "small_batch_size": 128, "epochs": 60, "seeds": 3},
        quick={"batch_size": 100, "small_batch_size": 32, "epochs": 2, "seeds": 1},
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    task = data.load(arguments.dataset, arguments.quick)
    epochs = len(METHODS) * arguments.seeds * arguments.epochs
    with tqdm(total=epochs, unit="epoch", dynamic_ncols=True) as bar:
        trainer = Trainer(task, arguments.epochs, strategy_named(arguments.strategy), bar)
        runs = compare(trainer, arguments)

    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "compare.json"
    save(runs, arguments, results)
    print_comparison(runs)
    picture = arguments.output / "compare.png"
    draw(runs, picture)
    print(f"\nWrote {results} and {picture}")


if __name__ == "__main__":
    main()
