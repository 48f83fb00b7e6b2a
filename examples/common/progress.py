"""Progress of `fit` on a bar that several calls of `fit` share."""

import keras
from tqdm import tqdm


class Advance(keras.callbacks.Callback):
    """Callback that advances a progress bar by one after each epoch."""

    def __init__(self, bar: tqdm) -> None:
        super().__init__()
        self.bar = bar

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.bar.update()
