"""Timing of the training steps within `fit`."""

import time
from typing import Any

import keras
import tensorflow as tf

from timing import Sampler


class _Clock(keras.callbacks.Callback):
    """Callback that keeps the time at which each batch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.ends.append(time.perf_counter())


def fit_sampler(model: keras.Model, batch: Any, steps: int) -> Sampler:
    """Return a sampler that trains with `fit` on one batch and times each step but the first.

    The first step of a call of `fit` is left out, as it includes the start of `fit`.

    Args:
        model: a compiled model.
        batch: inputs and labels.
        steps: the number of timed steps in each call of the sampler.
    """
    dataset = tf.data.Dataset.from_tensors(batch).repeat()

    def sample() -> list[float]:
        clock = _Clock()
        model.fit(dataset, steps_per_epoch=steps + 1, shuffle=False, verbose=0, callbacks=[clock])
        return [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]

    return sample
