"""The result of a suggestion: a learning rate, and how it came about."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LearningRateSuggestion:
    """Suggested learning rate, with all rates that were tried.

    Attributes:
        learning_rate: Float, the suggestion: the rate of the least loss, or that divided by the
            square root of 2.
        start: Float, the rate that was tried first.
        losses: Dictionary from each rate that was tried, in ascending order, to the mean training
            loss of its last five updates; infinite where training failed.
        updates: Int, the number of updates of each training.
        doubts: List of strings, the reasons not to trust the suggestion, each of which was a
            warning.
    """

    learning_rate: float
    start: float
    losses: dict[float, float]
    updates: int
    doubts: list[str]

    def __float__(self) -> float:
        """Return the suggested learning rate."""
        return self.learning_rate

    def plot(self, ax: Any = None) -> Any:
        """Draw the loss by learning rate, with the suggestion as a vertical line.

        Rates at which training failed are marked at the top.

        Args:
            ax: `matplotlib.axes.Axes` to draw into. Defaults to those of a new figure.

        Returns:
            The `matplotlib.axes.Axes`.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("`plot` needs matplotlib: `pip install matplotlib`.") from error
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        finite = {rate: loss for rate, loss in self.losses.items() if loss < float("inf")}
        failed = [rate for rate in self.losses if rate not in finite]
        ax.plot(list(finite), list(finite.values()), "o-", label="tried")
        if failed:
            ax.plot(
                failed,
                [1.0] * len(failed),
                "x",
                color="tab:red",
                transform=ax.get_xaxis_transform(),
                clip_on=False,
                label="not finite",
            )
        ax.axvline(
            self.learning_rate, ls="--", color="tab:green", label=f"{self.learning_rate:.3g}"
        )
        ax.set(
            xscale="log",
            xlabel="learning rate",
            ylabel=f"training loss after {self.updates} updates",
        )
        ax.legend()
        return ax
