"""The training loss at the end of a short training."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

GROUP = 5
"""Number of updates that a loss is averaged over."""

GROUPS = 4
"""Number of such means that are taken, those of the last updates."""


class EndLosses(keras.callbacks.Callback):
    """Callback that takes the mean training loss of the last groups of updates.

    It ends training where the loss is not finite.

    Args:
        updates: the number of updates of the training.
        micro_batches: the number of steps that make up an update.
        reset_metrics: resets the metrics of the model, of which the loss is one.
        advance: called with the number of updates that were done.

    Attributes:
        losses: the means, one for each group, the last at the end; infinite if not finite.

    Raises:
        ValueError: in training, if the training step returns no loss.
    """

    def __init__(
        self,
        updates: int,
        micro_batches: int,
        reset_metrics: Callable[[], None],
        advance: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._updates = updates
        self._micro_batches = micro_batches
        self._reset_metrics = reset_metrics
        self._advance = advance
        self.losses: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Reset the metrics, which are means since then, where a group begins."""
        updates, left = divmod(batch, self._micro_batches)
        if updates and not left and self._is_boundary(updates):
            self._reset_metrics()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Take the loss where a group ends, and advance the progress bar."""
        updates, left = divmod(batch + 1, self._micro_batches)
        if left:
            return
        self._advance(1)
        if not self._is_boundary(updates):
            return
        loss = _loss_of(logs)
        self.losses = [*self.losses, loss][-GROUPS:]
        if not math.isfinite(loss):
            self.model.stop_training = True
            self.losses = [math.inf]

    def _is_boundary(self, updates: int) -> bool:
        """Return whether a group ends after this number of updates."""
        return (self._updates - updates) % GROUP == 0


def _loss_of(logs: dict[str, Any] | None) -> float:
    """Return the loss in the logs of a batch.

    Raises:
        ValueError: if there is none.
    """
    if not logs or "loss" not in logs:
        raise ValueError(
            "The training step of `model` must return a value named 'loss'. "
            f"Received: {sorted(logs or {})}"
        )
    return float(logs["loss"])


def are_alike(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether the losses of two rates differ by less than their noise.

    Both were trained on the same batches, so the noise is that of their differences: the standard
    deviation over the groups.

    Args:
        losses: the losses of one rate, one for each group.
        others: those of another.
    """
    if len(losses) != len(others) or len(losses) < 2:
        return False
    differences = [a - b for a, b in zip(losses, others, strict=True)]
    mean = math.fsum(differences) / len(differences)
    squares = math.fsum((one - mean) ** 2 for one in differences)
    return abs(differences[-1]) < math.sqrt(squares / (len(differences) - 1))
