"""The suggested learning rates of the study, and their file."""

import json
import pathlib
from typing import NamedTuple


class Suggested(NamedTuple):
    """A suggestion at a setting of the study.

    Attributes:
        task: the task.
        setting: the name of the setting.
        batch_size: the number of samples in a batch.
        seed: the seed of the initial weights and of the order of samples.
        learning_rate: the suggestion.
        start: the rate that was tried first.
        losses: the rates that were tried, each with its loss.
        updates: the number of updates of each trial.
        doubts: the warnings.
        seconds: the duration.
    """

    task: str
    setting: str
    batch_size: int
    seed: int
    learning_rate: float
    start: float
    losses: list[tuple[float, float]]
    updates: int
    doubts: list[str]
    seconds: float

    @property
    def place(self) -> tuple[str, str, int]:
        """Return the task, the setting and the batch size."""
        return self.task, self.setting, self.batch_size


def read(path: pathlib.Path) -> list[Suggested]:
    """Read all suggestions of a file; none if there is no file."""
    return [Suggested(**one) for one in json.loads(path.read_text())] if path.exists() else []
