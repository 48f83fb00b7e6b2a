"""Keeps what is measured on each update of one optimizer, on PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import torch

from keras_sngm.backend.common.recorder import Measured, RecorderBase
from keras_sngm.backend.common.ring import Ring, row_of
from keras_sngm.backend.torch.lists import at_least_float32, values
from keras_sngm.measurements import HISTOGRAM, details, histogram


class Change(NamedTuple):
    """What an update changes.

    Attributes:
        before: copies of the weights before it.
        directions: g / norm(g) by position, for variables that have a gradient.
    """

    before: list[torch.Tensor]
    directions: Mapping[int, torch.Tensor]

    @classmethod
    def begin(
        cls, weights: Sequence[torch.Tensor], directions: Mapping[int, torch.Tensor]
    ) -> "Change":
        """To be called before it."""
        return cls([weight.clone() for weight in at_least_float32(weights)], directions)


class Recorder(RecorderBase):
    """Knows on the host which update is made, so that there are no conditions."""

    def _make_variables(self, optimizer: Any) -> None:
        super()._make_variables(optimizer)
        self._written = dict.fromkeys(self._rings, 0)

    def latest_norm(self) -> Any:
        """As NumPy has it, for Keras' progress bar takes no tensors of PyTorch."""
        return keras.ops.convert_to_numpy(self._latest)

    def hold(self, updates: int) -> None:
        self._to_hold = updates
        if self.is_open:
            # Not `assign`, which has the host wait for the device.
            self._held.value.fill_(updates)

    def may_step(self) -> torch.Tensor:
        """Whether a step may be taken. Asked only if the plan is to stop."""
        return torch.logical_not(self._halted.value & (self._held.value > 0))

    def is_due(self, step: int) -> bool:
        """Whether more than norms is recorded of the update of this number."""
        plan = self.plan
        return _divides(plan.details_every, step) or _divides(plan.histogram_every, step)

    @torch.no_grad()
    def record(self, step: int, measured: Measured, change: Change | None) -> None:
        """To be called after an update.

        Args:
            step: its number.
            measured: what it has measured.
            change: what it has changed, if that `is_due`.
        """
        self._write(self._updates, step, self._row(measured))
        self._latest.value.copy_(measured.norm)
        self._note_what_is_not_finite(step, measured)
        if change is None:
            return
        if _divides(self.plan.details_every, step):
            self._write(self._details, step, self._details_of(change))
        if _divides(self.plan.histogram_every, step):
            self._write(self._histograms, step, self._histograms_of(measured.norm, change))

    def _write(self, ring: Ring, step: int, values: torch.Tensor) -> None:
        # Not `torch.tensor`, which has the host wait for the device.
        row = row_of(torch.full((), step, device=values.device), values)
        ring.rows.value[self._written[ring] % ring.length].copy_(row)
        ring.count.value.add_(1)
        self._written[ring] += 1

    def _note_what_is_not_finite(self, step: int, measured: Measured) -> None:
        nonfinite = torch.logical_not(measured.is_finite)
        nonfinite_step, bad_ones = self._bad_step.value, self._bad.value
        first = nonfinite & (nonfinite_step == 0)
        bad_ones.copy_(torch.where(first, measured.nonfinite, bad_ones))
        nonfinite_step.copy_(torch.where(first, step, nonfinite_step))
        if not self.plan.stops:
            return
        halted = self._halted.value
        halted.logical_or_(nonfinite)
        self._held.value.sub_(1)
        for variable, backup in zip(self._guarded, self._backups, strict=True):
            backup.value.copy_(torch.where(halted, backup.value, variable.value))

    def _details_of(self, change: Change) -> torch.Tensor:
        momentums = self._momentums_now()
        after = at_least_float32([variable.value for variable in self.variables])
        rows = [
            details(*weights, momentums[i], change.directions.get(i))
            for i, weights in enumerate(zip(change.before, after, strict=True))
        ]
        return torch.cat(rows)

    def _histograms_of(self, norm: torch.Tensor, change: Change) -> torch.Tensor:
        rows, none = [], torch.zeros(HISTOGRAM, device=norm.device)
        for i, momentum in enumerate(self._momentums_now()):
            direction = change.directions.get(i)
            if direction is None:
                rows.append(none)
            else:
                rows.append(histogram(direction * norm.to(direction.dtype), segment_sum))
            if self.has_momentum:
                rows.append(none if momentum is None else histogram(momentum, segment_sum))
        return torch.cat(rows)

    def _momentums_now(self) -> list[torch.Tensor | None]:
        if not self.has_momentum:
            return [None] * len(self.variables)
        return [None if m is None else at_least_float32([m])[0] for m in values(self._momentums)]


def segment_sum(data: torch.Tensor, places: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Keras' own waits for the device, and counts in float32, so to 16 million."""
    sums = torch.zeros(num_segments, dtype=data.dtype, device=data.device)
    return sums.scatter_add_(0, places.long(), data)


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
