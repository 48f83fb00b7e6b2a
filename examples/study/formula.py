"""The formula for a learning rate: how far its rates are from the best ones of the study."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from keras_sngm import typical_learning_rate
from study.summary import SNGM, Summary


class Law(NamedTuple):
    """Learning rate as a power of the number of updates per epoch.

    Attributes:
        constant: the learning rate at one update per epoch.
        exponent: the exponent of the number of updates per epoch.
    """

    constant: float
    exponent: float

    def rate(self, each: Summary) -> float:
        """Return the learning rate for a setting and batch size."""
        return self.constant * updates_per_epoch(each) ** self.exponent


class Row(NamedTuple):
    """A learning rate for one setting and batch size, beside the best one.

    Attributes:
        task: the task of the study.
        summary: the results of SNGM there.
        rate: the learning rate.
        cost: by how many points the validation score at this rate is below that of the best one.
    """

    task: str
    summary: Summary
    rate: float
    cost: float

    @property
    def place(self) -> tuple[str, str, int]:
        """Return the task, the setting and the batch size."""
        return self.task, self.summary.setting, self.summary.batch_size

    @property
    def factor(self) -> float:
        """Return by what factor the rate is too large, below 1 if it is too small."""
        return self.rate / self.summary.learning_rate

    @property
    def distance(self) -> float:
        """Return the factor between the rate and the best one, at least 1."""
        return max(self.factor, 1.0 / self.factor)


def updates_per_epoch(each: Summary) -> float:
    """Return the number of updates in an epoch."""
    return each.steps / each.epochs


def of_sngm(tasks: Mapping[str, Sequence[Summary]]) -> list[tuple[str, Summary]]:
    """Return the results of SNGM at every setting and batch size, with the name of the task."""
    return [(task, each) for task, found in tasks.items() for each in found if each.method == SNGM]


def fitted(summaries: Sequence[Summary]) -> Law:
    """Return the law that fits best learning rates, by least squares of their logarithms."""
    x = [math.log(updates_per_epoch(each)) for each in summaries]
    y = [math.log(each.learning_rate) for each in summaries]
    exponent, constant = np.polyfit(x, y, 1)
    return Law(math.exp(constant), float(exponent))


def fitted_without(tasks: Mapping[str, Sequence[Summary]], task: str) -> Law:
    """Return the law that fits the best learning rates of all tasks but one."""
    return fitted([each for name, each in of_sngm(tasks) if name != task])


def row(task: str, summary: Summary, rate: float) -> Row:
    """Return what a learning rate costs at a setting and batch size of a task."""
    return Row(task, summary, rate, summary.best_score - summary.score_at(rate))


def formula_rows(tasks: Mapping[str, Sequence[Summary]]) -> list[Row]:
    """Return the rate of the package's formula for all results of SNGM."""
    return [
        row(task, each, typical_learning_rate(updates_per_epoch(each)))
        for task, each in of_sngm(tasks)
    ]


def left_out_rows(tasks: Mapping[str, Sequence[Summary]]) -> list[Row]:
    """Return rates of laws that were fitted without the task that they are for."""
    return [
        row(task, each, fitted_without(tasks, task).rate(each)) for task, each in of_sngm(tasks)
    ]


class Quality(NamedTuple):
    """How good some learning rates are.

    Attributes:
        mean: the mean cost in points.
        greatest: the greatest cost in points.
        within_a_point: the share of rates, in percent, that cost at most one point.
        within_two: the share of rates, in percent, within a factor of two of the best.
    """

    mean: float
    greatest: float
    within_a_point: float
    within_two: float


def quality(rows: Sequence[Row]) -> Quality:
    """Return how good the learning rates of some rows are."""
    return Quality(
        statistics.fmean(each.cost for each in rows),
        max(each.cost for each in rows),
        100.0 * statistics.fmean(each.cost <= 1.0 for each in rows),
        # A factor of exactly two may be a little more in floating point.
        100.0 * statistics.fmean(each.distance <= 2.0 * (1.0 + 1e-9) for each in rows),
    )
