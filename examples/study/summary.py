"""What the runs of a study say, in numbers."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from study import results
from study.results import Run
from study.search import best_rate, learning_rate


class Summary(NamedTuple):
    """One method at one batch size.

    Attributes:
        setting: name of the setting.
        batch_size: in samples.
        method: name of the method.
        tuning: mean validation score in percent by exponent of the learning rate 2^(k/2),
            of the rates that were tried with all seeds.
        final: the runs that count, by seed.
    """

    setting: str
    batch_size: int
    method: str
    tuning: dict[int, float]
    final: dict[int, Run]

    @property
    def best(self) -> int:
        """The exponent that was chosen."""
        return best_rate(self.tuning)

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.best)

    @property
    def best_score(self) -> float:
        """The mean validation score at the best learning rate."""
        return self.tuning[self.best]

    @property
    def test(self) -> list[float]:
        """Test scores in percent, in the order of the seeds."""
        return [100.0 * self.final[seed].test for seed in sorted(self.final)]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.test)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.test)

    @property
    def train_loss(self) -> float:
        """Mean training loss of the last epoch."""
        return statistics.fmean(run.train_loss[-1] for run in self.final.values())

    @property
    def steps(self) -> int:
        return next(iter(self.final.values())).steps

    @property
    def good_range(self) -> float:
        """The largest by the smallest rate around the best that cost at most one point."""
        return self.range_above(self.best_score - 1.0)

    def range_above(self, score: float) -> float:
        """The largest by the smallest rate around the best with at least that validation score.

        Only rates that were tried count, so a range can be wider than this says.
        """
        below = [k for k, mean in self.tuning.items() if mean < score]
        least = max((k for k in below if k < self.best), default=-np.inf)
        most = min((k for k in below if k > self.best), default=np.inf)
        good = [k for k in self.tuning if least < k < most]
        return learning_rate(max(good) - min(good))

    @property
    def curve(self) -> np.ndarray:
        """Validation scores in percent: seeds, epochs. The last one stays where training failed."""
        return 100.0 * _padded([run.validation for run in self.final.values()], self.epochs)

    @property
    def grad_norm(self) -> np.ndarray:
        """Mean gradient norm of each epoch: seeds, epochs."""
        return _padded([run.grad_norm for run in self.final.values()], self.epochs)

    @property
    def typical_norm(self) -> float:
        """Median of the gradient norms of all epochs and seeds."""
        return float(np.median(self.grad_norm))

    @property
    def epochs(self) -> int:
        return next(iter(self.final.values())).epochs


class Difference(NamedTuple):
    """How much better a method is than another, by pairs of runs with the same seed."""

    mean: float
    p_value: float


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """One for each search that is done, in the order of the file."""
    all_ = [_summary(key, group) for key, group in results.grouped(runs).items()]
    most = max((len(each.final) for each in all_), default=0)
    return [each for each in all_ if len(each.final) == most > 1]


def _summary(key: tuple[str, int, str], runs: list[Run]) -> Summary:
    scores: dict[int, list[float]] = {}
    for run in runs:
        if not run.final:
            scores.setdefault(run.exponent, []).append(100.0 * run.validation[-1])
    seeds = max(len(values) for values in scores.values())
    tuning = {k: statistics.fmean(v) for k, v in sorted(scores.items()) if len(v) == seeds}
    return Summary(*key, tuning, {run.seed: run for run in runs if run.final})


def groups_of(summaries: Sequence[Summary]) -> dict[tuple[str, int], list[Summary]]:
    """The methods that were compared with each other, by setting and batch size."""
    groups: dict[tuple[str, int], list[Summary]] = {}
    for each in summaries:
        groups.setdefault((each.setting, each.batch_size), []).append(each)
    return groups


def difference(one: Summary, other: Summary) -> Difference:
    """By how many points of the test score `one` is better, and the paired t-test's p."""
    test = scipy.stats.ttest_rel(one.test, other.test)
    return Difference(one.mean - other.mean, float(test.pvalue))


def target_of(group: Sequence[Summary]) -> int:
    """A validation score that about half of the methods reach: their median, rounded down."""
    return int(statistics.median(each.curve[:, -1].mean() for each in group))


def epochs_to(summary: Summary, target: float) -> int | None:
    """The first epoch at which the mean over the seeds reaches a validation score."""
    reached = np.flatnonzero(summary.curve.mean(axis=0) >= target)
    return int(reached[0]) + 1 if len(reached) else None


def _padded(lines: list[list[float]], length: int) -> np.ndarray:
    return np.array([line + [line[-1]] * (length - len(line)) for line in lines])
