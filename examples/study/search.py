"""Search for a learning rate: the runs to do next, given the finished ones."""

import math
import statistics
from collections.abc import Sequence

from study.config import Search, Study
from study.results import Run, Wanted


def wanted(study: Study, search: Search, runs: Sequence[Run]) -> list[Wanted]:
    """Return the next runs of a search, in the order to do them; none if the search is done.

    Args:
        study: the study, which sets the number of rates and the seeds.
        search: the search.
        runs: the finished runs of this search.
    """
    done = {(run.exponent, run.seed) for run in runs}
    scores = scores_by_rate(study, runs)
    exponents = next_rates(scores, search.start, study.rates)
    # `next_rates` returns a rate once more if its runs were interrupted, as it has no score yet.
    tuning = [Wanted(k, seed, final=False) for k in exponents for seed in study.tuning_seeds]
    final = []
    if not exponents:
        final = [Wanted(best_rate(scores), seed, final=True) for seed in study.final_seeds]
    return [each for each in tuning + final if (each.exponent, each.seed) not in done]


def scores_by_rate(study: Study, runs: Sequence[Run]) -> dict[int, float]:
    """Return mean validation scores by rate exponent, of rates tried with all tuning seeds."""
    scores: dict[int, list[float]] = {}
    for run in runs:
        if not run.final:
            scores.setdefault(run.exponent, []).append(run.validation[-1])
    return {
        exponent: statistics.fmean(values)
        for exponent, values in sorted(scores.items())
        if len(values) == len(study.tuning_seeds)
    }


def best_rate(scores: dict[int, float]) -> int:
    """Return the exponent of the highest score; of several such exponents the middle one.

    A model that learns nothing has the same score at all rates. An exponent at their edge would
    then extend the search without end.
    """
    highest = max(scores.values())
    ties = sorted(exponent for exponent, score in scores.items() if score == highest)
    return ties[len(ties) // 2]


def next_rates(scores: dict[int, float], start: int, count: int) -> list[int]:
    """Return the exponents k to try next on the grid 2^(k/2); none when the search is complete.

    First come four rates that lie a factor of 2 apart, around `start`. Then come both
    neighbours of the best rate, repeatedly until the neighbours of the best have been tried, so
    that it never lies at an edge. Then comes the untried rate nearest to the best, until `count`
    rates have been tried.

    Args:
        scores: the mean validation score of each exponent that was tried.
        start: the exponent in the middle of the first four.
        count: the least number of rates to try.
    """
    first = [k for k in range(start - 3, start + 4, 2) if k not in scores]
    if first:
        return first
    best = best_rate(scores)
    neighbours = [k for k in (best - 1, best + 1) if k not in scores]
    if neighbours or len(scores) >= count:
        return neighbours
    nearest = min(
        (k for k in range(best - count, best + count + 1) if k not in scores),
        key=lambda k: (abs(k - best), k),
    )
    return [nearest]


def learning_rate(exponent: int) -> float:
    """Return 2^(exponent / 2)."""
    return math.sqrt(2.0) ** exponent
