"""Trains with a logger that logs all it can, and keeps what is needed to check it.

Run by `test_logged_values.py`, as devices must be configured before TensorFlow starts.

    python logged_training.py STRATEGY OUTPUT

STRATEGY is the number of replicas, "0" for none, or "2-in-replicas": two that
TensorFlow does not let a step leave, as in XLA on GPUs.
"""

import json
import pathlib
import pickle
import sys
import tempfile
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
from replica_training import components, forbid_merge_call, inner, make_strategy


class Witness(keras.callbacks.Callback):
    """Keeps weights and momenta."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self.strategy = strategy
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
        return [components(self.strategy, v)[0].numpy() for v in variables]


def train(strategy: tf.distribute.Strategy, case: Case) -> Logged:
    with strategy.scope():
        model = case.model()
        model.compile(optimizer=case.make(), loss="mse", **case.compile)
    witness = Witness(strategy)
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
        batches = tf.data.Dataset.from_tensor_slices(case.data()).batch(BATCH).repeat()
        history = model.fit(
            batches,
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
                value = tf.make_ndarray(event.tensor_proto)
                if value.ndim:
                    histograms.setdefault(event.step, {})[tag] = value
                else:
                    scalars.setdefault(event.step, {})[tag] = float(value)
    paths = [v.path for v in model.trainable_variables]
    return Logged(witness.weights, witness.momenta, lines, scalars, histograms, history, paths)


def main(name: str, output: str) -> None:
    replicas, _, cannot_be_left = name.partition("-")
    strategy = make_strategy(int(replicas))
    if cannot_be_left:
        forbid_merge_call()
    results = {job: train(strategy, case) for job, case in CASES.items() if name in case.strategies}
    with open(output, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
