"""The order in which learning rates are tried.

A rate is named by its exponent: the k of `start * 2 ** (k / 2)`.
"""

import math
from collections.abc import Mapping

MOST_RATES = 10


def next_exponent(losses: Mapping[int, float]) -> int | None:
    """Return the exponent of the rate to try next, `None` if the search is over.

    The start comes first. Rates a factor of 2 apart follow until the best one has a worse one on
    either side, then its neighbours a factor of the square root of 2 away.

    Args:
        losses: the loss of each exponent that was tried.
    """
    wanted = [*_bracket(losses), *_neighbours(losses)]
    return wanted[0] if wanted and len(losses) < MOST_RATES else None


def expected_rates(losses: Mapping[int, float]) -> int:
    """Return how many rates will be tried in all if no further one is the best.

    Args:
        losses: the loss of each exponent that was tried.
    """
    left = len(_bracket(losses)) + len(_neighbours(losses))
    return min(len(losses) + left, MOST_RATES)


def rate_of(exponent: int, start: float) -> float:
    """Return the learning rate of an exponent.

    Args:
        exponent: the exponent.
        start: the learning rate of the exponent 0.
    """
    return start * 2.0 ** (exponent / 2)


def is_bracketed(losses: Mapping[int, float]) -> bool:
    """Return whether the best of the rates a factor of 2 apart has a worse one on either side.

    Args:
        losses: the loss of each exponent that was tried.
    """
    return not _bracket(losses)


def best_exponent(losses: Mapping[int, float]) -> int:
    """Return the exponent with the least loss; of several such exponents the lowest."""
    return min(losses, key=lambda k: (losses[k], k))


def suggested_rate(losses: Mapping[int, float], start: float) -> float:
    """Return the rate of the least loss, or that divided by the square root of 2.

    Rates that are best for a short training are rather large for the whole one. The rate is kept if
    the next higher rate is better than the next lower one, as the best one is then the higher.

    Args:
        losses: the loss of each exponent that was tried.
        start: the learning rate of the exponent 0.
    """
    best = best_exponent(losses)
    lower, higher = (losses.get(k, math.inf) for k in (best - 1, best + 1))
    return rate_of(best if higher < lower else best - 1, start)


def _bracket(losses: Mapping[int, float]) -> list[int]:
    """Return the untried exponents among the best rate and those a factor of 2 above and below."""
    best = _best_of_bracket(losses)
    return [k for k in (best, best + 2, best - 2) if k not in losses]


def _neighbours(losses: Mapping[int, float]) -> list[int]:
    """Return the untried exponents next to the best of the rates a factor of 2 apart."""
    best = _best_of_bracket(losses)
    return [k for k in (best + 1, best - 1) if k not in losses]


def _best_of_bracket(losses: Mapping[int, float]) -> int:
    """Return the best exponent among those of rates a factor of 2 apart, 0 before the first."""
    return best_exponent({k: loss for k, loss in losses.items() if k % 2 == 0} or {0: 0.0})
