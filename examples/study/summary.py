"""Statistics of the runs of a study."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from study import results
from study.results import Run
from study.search import best_rate, learning_rate

SNGM = "SNGM"
"""The name of the method that all others are compared with."""


class Summary(NamedTuple):
    """The results of one method at one batch size.

    Attributes:
        setting: the name of the setting.
        batch_size: the number of samples in a batch.
        method: the name of the method.
        tuning: the mean validation score in percent by exponent k of the learning rate
            2^(k/2), for rates that were tried with all seeds.
        final: the runs that are reported, by seed.
    """

    setting: str
    batch_size: int
    method: str
    tuning: dict[int, float]
    final: dict[int, Run]

    @property
    def best(self) -> int:
        """Return the k of the best learning rate 2^(k/2)."""
        return best_rate(self.tuning)

    @property
    def learning_rate(self) -> float:
        """Return the best learning rate."""
        return learning_rate(self.best)

    @property
    def best_score(self) -> float:
        """Return the mean validation score in percent at the best learning rate."""
        return self.tuning[self.best]

    def score_at(self, rate: float) -> float:
        """Return the mean validation score in percent at a learning rate.

        It is interpolated between the rates that were tried, on a logarithmic scale. Beyond them
        it is the score of the last one.
        """
        exponents = sorted(self.tuning)
        scores = [self.tuning[k] for k in exponents]
        return float(np.interp(2.0 * math.log2(rate), exponents, scores))

    @property
    def test(self) -> list[float]:
        """Return the test scores in percent, in the order of the seeds."""
        return [100.0 * self.final[seed].test for seed in sorted(self.final)]

    @property
    def mean(self) -> float:
        """Return the mean test score in percent over the seeds."""
        return statistics.fmean(self.test)

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the test scores in percent over the seeds."""
        return statistics.stdev(self.test)

    @property
    def train_loss(self) -> float:
        """Return the mean training loss of the last epoch over the seeds."""
        return statistics.fmean(run.train_loss[-1] for run in self.final.values())

    @property
    def steps(self) -> int:
        return next(iter(self.final.values())).steps

    @property
    def good_range(self) -> float:
        """Return the ratio of the largest to the smallest learning rate of the good range.

        Rates in this range around the best one have a validation score that is at most one
        percentage point lower.
        """
        return self.range_above(self.best_score - 1.0)

    def range_above(self, score: float) -> float:
        """Return the ratio of the largest to the smallest good rate around the best one.

        All rates that were tried between the two have at least the given mean validation score.
        The true range can be wider, as only rates that were tried count.

        Args:
            score: the validation score in percent.
        """
        below = [k for k, mean in self.tuning.items() if mean < score]
        least = max((k for k in below if k < self.best), default=-np.inf)
        most = min((k for k in below if k > self.best), default=np.inf)
        good = [k for k in self.tuning if least < k < most]
        return learning_rate(max(good) - min(good))

    @property
    def curve(self) -> np.ndarray:
        """Return validation scores in percent, shape (seeds, epochs).

        The last score of a training that failed is repeated.
        """
        return 100.0 * _padded([run.validation for run in self.final.values()], self.epochs)

    @property
    def grad_norm(self) -> np.ndarray:
        """Return the mean gradient norm of each epoch, shape (seeds, epochs)."""
        return _padded([run.grad_norm for run in self.final.values()], self.epochs)

    @property
    def typical_norm(self) -> float:
        """Return the median of the gradient norms of all epochs and seeds."""
        return float(np.median(self.grad_norm))

    @property
    def epochs(self) -> int:
        return next(iter(self.final.values())).epochs


class Difference(NamedTuple):
    """The lead of one method over another, from pairs of runs with the same seed.

    Attributes:
        mean: the difference of the mean test scores in percent.
        p_value: the p-value of the paired t-test.
    """

    mean: float
    p_value: float


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """Return a summary of each finished search, in the order of the runs.

    A search is finished if it has as many reported runs as the search with most of them, and at
    least two.
    """
    all_ = [_summary(key, group) for key, group in results.grouped(runs).items()]
    most = max((len(each.final) for each in all_), default=0)
    return [each for each in all_ if len(each.final) == most > 1]


def _summary(key: tuple[str, int, str], runs: list[Run]) -> Summary:
    """Return the summary of all runs of one search."""
    scores: dict[int, list[float]] = {}
    for run in runs:
        if not run.final:
            scores.setdefault(run.exponent, []).append(100.0 * run.validation[-1])
    seeds = max(len(values) for values in scores.values())
    tuning = {k: statistics.fmean(v) for k, v in sorted(scores.items()) if len(v) == seeds}
    return Summary(*key, tuning, {run.seed: run for run in runs if run.final})


def groups_of(summaries: Sequence[Summary]) -> dict[tuple[str, int], list[Summary]]:
    """Group summaries by setting and batch size: the methods compared with each other."""
    groups: dict[tuple[str, int], list[Summary]] = {}
    for each in summaries:
        groups.setdefault((each.setting, each.batch_size), []).append(each)
    return groups


def difference(one: Summary, other: Summary) -> Difference:
    """Return by how much the test score of `one` is better, and the p-value of a paired t-test."""
    test = scipy.stats.ttest_rel(one.test, other.test)
    return Difference(one.mean - other.mean, float(test.pvalue))


def target_of(group: Sequence[Summary]) -> int:
    """Return a validation score in percent that about half of the methods reach.

    It is the median of the methods' mean scores after the last epoch, rounded down.
    """
    return int(statistics.median(each.curve[:, -1].mean() for each in group))


def epochs_to(summary: Summary, target: float) -> int | None:
    """Return the first epoch at which the mean validation score over the seeds reaches `target`.

    Epochs count from 1. Returns `None` if no epoch does.
    """
    reached = np.flatnonzero(summary.curve.mean(axis=0) >= target)
    return int(reached[0]) + 1 if len(reached) else None


def _padded(lines: list[list[float]], length: int) -> np.ndarray:
    """Return a matrix of lists, each extended to `length` by its last value."""
    return np.array([line + [line[-1]] * (length - len(line)) for line in lines])
