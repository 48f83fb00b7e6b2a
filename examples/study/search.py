"""Which runs a search still needs, from those that it has."""

import math
import statistics
from collections.abc import Sequence

from study.config import Search, Study
from study.results import Run, Wanted


def wanted(study: Study, search: Search, runs: Sequence[Run]) -> list[Wanted]:
    """The next runs to do, in their order; none if the search is done.

    Args:
        study: says how many rates and seeds.
        search: the one asked about.
        runs: those of this search that are there.
    """
    done = {(run.exponent, run.seed) for run in runs}
    scores = scores_by_rate(study, runs)
    exponents = next_rates(scores, search.start, study.rates)
    # Rates whose runs were interrupted come first: their scores are not known yet.
    tuning = [Wanted(k, seed, final=False) for k in exponents for seed in study.tuning_seeds]
    final = []
    if not exponents:
        final = [Wanted(best_rate(scores), seed, final=True) for seed in study.final_seeds]
    return [each for each in tuning + final if (each.exponent, each.seed) not in done]


def scores_by_rate(study: Study, runs: Sequence[Run]) -> dict[int, float]:
    """Mean validation score over the seeds, of the rates that were tried with all of them."""
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
    """The exponent of the highest score, of several the middle one.

    One at their edge would have the search go on for ever where nothing is learned.
    """
    highest = max(scores.values())
    ties = sorted(exponent for exponent, score in scores.items() if score == highest)
    return ties[len(ties) // 2]


def next_rates(scores: dict[int, float], start: int, count: int) -> list[int]:
    """The exponents k to try next on the grid 2^(k/2); none when the best is known.

    First four rates that lie a factor of 2 apart, around `start`. Then both neighbours
    of the best, again and again until they have been tried, so that the best never lies
    at an edge. Then whatever is nearest to it, until there are `count`.
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
    """2^(exponent / 2)."""
    return math.sqrt(2.0) ** exponent
