"""Trains with a logger that logs all it can, and keeps the values that a test needs to check it.

`test_logged_values.py` runs this in its own process, as devices must be configured before
TensorFlow starts.

    python logged_training.py STRATEGY OUTPUT NAME ...

The names are those of the cases to train.

STRATEGY is "0" for training without a strategy, else the number of replicas of TensorFlow's
`MirroredStrategy`. With "2-in-replicas" there are two replicas, and steps must not enter the
cross-replica context, as in XLA programs on GPUs.
"""

import contextlib
import json
import pathlib
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from keras_sngm import SNGM, GradientNormLogger
from logged_cases import (
    BATCH,
    CASES,
    EPOCHS,
    HISTOGRAM_EVERY,
    LOG_EVERY,
    STEPS_PER_EPOCH,
    Case,
    Logged,
)
from replica_options import inner


class Witness(keras.callbacks.Callback):
    """Callback that keeps the weights at first, and weights and momentums after each batch.

    Args:
        first_of: a function of a variable that returns its component on the first replica.
    """

    def __init__(self, first_of: Callable[[keras.Variable], Any]) -> None:
        super().__init__()
        self.first_of = first_of
        self.weights: list[list[np.ndarray]] = []
        self.momenta: list[list[np.ndarray]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.weights.append(self._values(self.model.trainable_variables))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        optimizer = inner(self.model.optimizer)
        self.weights.append(self._values(self.model.trainable_variables))
        momenta = optimizer.momentums if isinstance(optimizer, SNGM) else []
        self.momenta.append(self._values(momenta))

    def _values(self, variables: list[keras.Variable]) -> list[np.ndarray]:
        return [self.first_of(v).numpy() for v in variables]


def endless_batches(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the batches of an epoch again and again.

    All epochs share one iterator, because TensorFlow takes long to delete an iterator.
    """
    while True:
        for begin in range(0, len(x), BATCH):
            yield x[begin : begin + BATCH], y[begin : begin + BATCH]


class Place(NamedTuple):
    """A place to train in: a strategy, or none.

    Attributes:
        scope: returns the context in which a model must be made.
        first_of: a function of a variable that returns its component on the first replica.
        batches: a function of inputs and targets that returns global batches without end.
    """

    scope: Callable[[], Any] = contextlib.nullcontext
    first_of: Callable[[keras.Variable], Any] = lambda variable: variable
    batches: Callable[[np.ndarray, np.ndarray], Any] = endless_batches


def place(name: str) -> Place:
    """Return the place that the argument STRATEGY names."""
    replicas, _, cannot_be_left = name.partition("-")
    if replicas == "0":
        return Place()
    import tensorflow as tf

    from replica_training import components, forbid_merge_call, make_strategy

    strategy = make_strategy(int(replicas))
    if cannot_be_left:
        forbid_merge_call()
    return Place(
        strategy.scope,
        lambda variable: components(strategy, variable)[0],
        lambda *arrays: tf.data.Dataset.from_tensor_slices(arrays).batch(BATCH).repeat(),
    )


def train(where: Place, case: Case) -> Logged:
    """Do a training job with a logger, and read what it has logged."""
    with where.scope():
        model = case.model()
        model.compile(optimizer=case.make(), loss="mse", **case.compile)
        model.optimizer.build(model.trainable_variables)  # so that TensorFlow traces once
    witness = Witness(where.first_of)
    with tempfile.TemporaryDirectory() as folder:
        filename = pathlib.Path(folder) / "log.jsonl"
        logger = GradientNormLogger(
            log_dir=folder,
            filename=filename,
            log_every=LOG_EVERY,
            per_variable=True,
            update_ratio=True,
            histogram_every=HISTOGRAM_EVERY,
        )
        history = model.fit(
            where.batches(*case.data()),
            epochs=EPOCHS,
            steps_per_epoch=STEPS_PER_EPOCH,
            verbose=0,
            callbacks=[logger, witness],
        ).history
        lines = [json.loads(line) for line in filename.read_text().splitlines()]
        events = EventAccumulator(folder, size_guidance={"tensors": 0}).Reload()
        scalars: dict[int, dict[str, float]] = {}
        histograms: dict[int, dict[str, np.ndarray]] = {}
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                value = make_ndarray(event.tensor_proto)
                if value.ndim:
                    histograms.setdefault(event.step, {})[tag] = value
                else:
                    scalars.setdefault(event.step, {})[tag] = float(value)
    paths = [v.path for v in model.trainable_variables]
    return Logged(witness.weights, witness.momenta, lines, scalars, histograms, history, paths)


def main(strategy: str, output: str, *names: str) -> None:
    """Do jobs under a strategy, and write what was logged to a pickle file."""
    where = place(strategy)
    results = {name: train(where, CASES[name]) for name in names}
    with open(output, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
