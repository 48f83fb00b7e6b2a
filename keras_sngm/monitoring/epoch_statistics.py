"""Statistics of an epoch for its `logs`, in memory that does not grow with its updates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class EpochStatistics:
    """Means of the values of an epoch, and the extremes of the gradient norm.

    NaN where there is no value, or where one of them is NaN. Of the noise scale, which is an
    average already, the last value is kept.

    Args:
        names: names of the values.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._series = {name: _Series() for name in names}

    def add(self, values: Mapping[str, Any]) -> None:
        """Add the values of some updates. Values whose names were not announced are left out.

        Args:
            values: by name, vectors with one element for each update, or numbers of one update.
        """
        for name, series in self._series.items():
            if name in values:
                series.add(np.atleast_1d(values[name]))

    def end(self) -> dict[str, float]:
        """Return the statistics of the epoch, and begin another one."""
        logs = {}
        for name, series in self._series.items():
            logs[name] = series.last if name == "gradient_noise_scale" else series.mean
            if name == "grad_norm":
                logs["grad_norm_max"] = series.greatest
                logs["grad_norm_min"] = series.least
        self._series = {name: _Series() for name in self._series}
        return logs


class _Series:
    """Statistics of numbers that come in parts. NaN as long as there is no number."""

    def __init__(self) -> None:
        self.greatest = math.nan
        self.least = math.nan
        self.last = math.nan
        self._total = 0.0
        self._count = 0

    @property
    def mean(self) -> float:
        """Mean of all numbers so far."""
        return self._total / self._count if self._count else math.nan

    def add(self, numbers: np.ndarray) -> None:
        """Add the elements of a vector."""
        if not numbers.size:
            return
        greatest, least = np.max(numbers), np.min(numbers)
        if self._count:
            # Python's `max` and `min` would overlook NaN.
            greatest = np.maximum(greatest, self.greatest)
            least = np.minimum(least, self.least)
        self.greatest, self.least = float(greatest), float(least)
        self.last = float(numbers[-1])
        self._total += float(np.sum(numbers, dtype="float64"))
        self._count += numbers.size
