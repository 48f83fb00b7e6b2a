"""Times the steps within `fit`."""

import time
from typing import Any

import keras
import tensorflow as tf

from timing import Sampler


class _Clock(keras.callbacks.Callback):
    """When each batch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.ends.append(time.perf_counter())


def fit_sampler(model: keras.Model, batch: Any, steps: int) -> Sampler:
    """A call of `fit` on one batch again and again; its first step is not counted."""
    dataset = tf.data.Dataset.from_tensors(batch).repeat()

    def sample() -> list[float]:
        clock = _Clock()
        model.fit(dataset, steps_per_epoch=steps + 1, shuffle=False, verbose=0, callbacks=[clock])
        return [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]

    return sample
