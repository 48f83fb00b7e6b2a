"""The progress bar of a suggestion."""

from typing import Any

import keras


class Progress:
    """Progress bar that counts the updates of all trials, and estimates how many are left.

    Args:
        updates: the number of updates of each trial.
        verbose: 0 for no bar, 1 or `"auto"` for one.

    Attributes:
        updates: as given.
    """

    def __init__(self, updates: int, verbose: Any) -> None:
        self.updates = updates
        self._done = 0
        self._bar: Any = None
        if verbose:
            self._bar = keras.utils.Progbar(
                None, unit_name="update", stateful_metrics=["learning_rate", "loss"]
            )

    def expect(self, rates: int) -> None:
        """Set the number of trials that are expected in all."""
        if self._bar is not None:
            self._bar.target = rates * self.updates

    def advance(self, updates: int) -> None:
        """Count updates that were taken."""
        self._done += updates
        if self._bar is not None:
            self._bar.update(self._done, finalize=False)

    def end_trial(self, trial: int, rate: float, loss: float) -> None:
        """Show the result of a trial, of which the updates that were left out count as done.

        Args:
            trial: the number of the trial, from 1.
            rate: its learning rate.
            loss: its training loss.
        """
        self._done = trial * self.updates
        if self._bar is not None:
            values = [("learning_rate", rate), ("loss", loss)]
            self._bar.update(self._done, values, finalize=False)

    def close(self) -> None:
        """Show the bar as complete."""
        if self._bar is not None:
            self._bar.update(self._done, finalize=True)
