"""Recorder of the updates of one optimizer on PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import torch

from keras_sngm.backend.common.measured import Measured
from keras_sngm.backend.common.recorder import RecorderBase
from keras_sngm.backend.common.ring import Ring, row_of
from keras_sngm.backend.torch.lists import at_least_float32, values
from keras_sngm.measurements import HISTOGRAM, details, histogram


class Change(NamedTuple):
    """Weights before an update, and its directions, to measure afterwards what it has changed.

    Attributes:
        before: copies of the weights before it.
        directions: by a variable's index, its part of g / norm(g), the whole gradient divided by
            its norm, if it has a gradient.
    """

    before: list[torch.Tensor]
    directions: Mapping[int, torch.Tensor]

    @classmethod
    def begin(
        cls, weights: Sequence[torch.Tensor], directions: Mapping[int, torch.Tensor]
    ) -> "Change":
        """Copy the weights. To be called before the update.

        Args:
            weights: the weights of all variables.
            directions: by a variable's index, its part of g / norm(g), if it has a gradient.
        """
        return cls([weight.clone() for weight in at_least_float32(weights)], directions)


class Recorder(RecorderBase):
    """Recorder on PyTorch, where the host knows the number of each update.

    In a halt no step is taken, as a gradient was not finite; the variables to be restored then, the
    model's weights that are not trainable, are backed up in each update before.
    """

    def _make_variables(self, optimizer: Any) -> None:
        """Create the ring buffers and all other variables. The host counts the rows written."""
        super()._make_variables(optimizer)
        self._written = dict.fromkeys(self._rings, 0)

    def latest_norm(self) -> Any:
        """Return the gradient norm of the last update, as a NumPy scalar. Waits for the device.

        Keras' progress bar cannot format PyTorch tensors.
        """
        return keras.ops.convert_to_numpy(self._latest)

    def limit_halt(self, updates: int) -> None:
        """Let a halt last for at most `updates` more updates.

        In a halt no step is taken, as a gradient was not finite. If the plan does not stop, this
        has no effect.
        """
        self._halt_limit = updates
        if self.is_open:
            # `assign` would make the host wait for the device.
            self._halt_updates_left.value.fill_(updates)

    def may_step(self) -> torch.Tensor:
        """Return a boolean scalar: whether the optimizer may take its next step.

        It may not once a gradient was not finite, for as many updates as `limit_halt` has set.
        To be asked only if the plan `stops`.
        """
        return torch.logical_not(self._is_halted.value & (self._halt_updates_left.value > 0))

    def is_due(self, step: int) -> bool:
        """Return whether details or histograms are recorded of the update with this number."""
        plan = self.plan
        return _divides(plan.details_every, step) or _divides(plan.histogram_every, step)

    @torch.no_grad()
    def record(self, step: int, measured: Measured, change: Change | None) -> None:
        """Record an update that was made.

        Args:
            step: the number of the update.
            measured: what was measured on its gradient.
            change: the weights before it, and its directions; needed only if it `is_due`, else
                `None`.
        """
        self._write(self._updates, step, self._row(measured))
        self._latest.value.copy_(measured.norm)
        self._record_nonfinite(step, measured)
        if change is None:
            return
        if _divides(self.plan.details_every, step):
            self._write(self._details, step, self._details_of(change))
        if _divides(self.plan.histogram_every, step):
            self._write(self._histograms, step, self._histograms_of(measured.norm, change))

    def _write(self, ring: Ring, step: int, values: torch.Tensor) -> None:
        """Append a row to a ring buffer, in the place of the oldest if it is full.

        Args:
            ring: the ring buffer.
            step: the number of the update, which the row begins with.
            values: vector, the rest of the row.
        """
        # `torch.tensor` would make the host wait for the device.
        row = row_of(torch.full((), step, device=values.device), values)
        ring.rows.value[self._written[ring] % ring.length].copy_(row)
        ring.count.value.add_(1)
        self._written[ring] += 1

    def _record_nonfinite(self, step: int, measured: Measured) -> None:
        """Note the first update whose gradient is not finite; if the plan `stops`, begin a halt.

        In a halt no step is taken, for as many updates as are left to it, which are counted down in
        each update. Until it begins the variables to be restored are backed up in each update.

        Args:
            step: the number of the update.
            measured: what was measured on its gradient.
        """
        nonfinite = torch.logical_not(measured.is_finite)
        nonfinite_step, nonfinite_ones = self._nonfinite_step.value, self._nonfinite.value
        first = nonfinite & (nonfinite_step == 0)
        nonfinite_ones.copy_(torch.where(first, measured.nonfinite, nonfinite_ones))
        nonfinite_step.copy_(torch.where(first, step, nonfinite_step))
        if not self.plan.stops:
            return
        halted = self._is_halted.value
        halted.logical_or_(nonfinite)
        self._halt_updates_left.value.sub_(1)
        for variable, backup in zip(self._restorable, self._backups, strict=True):
            backup.value.copy_(torch.where(halted, backup.value, variable.value))

    def _details_of(self, change: Change) -> torch.Tensor:
        """Return the `DETAILS` of all variables, one after the other in one vector.

        These are norms of the weight, of its update and of its momentum, the inner product of
        momentum and direction, and the norm of the direction; 0 for what a variable does not have.

        Args:
            change: the weights before the update, and the directions, parts of g / norm(g).
        """
        momentums = self._momentums_now()
        after = at_least_float32([variable.value for variable in self.variables])
        rows = [
            details(*weights, momentums[i], change.directions.get(i))
            for i, weights in enumerate(zip(change.before, after, strict=True))
        ]
        return torch.cat(rows)

    def _histograms_of(self, norm: torch.Tensor, change: Change) -> torch.Tensor:
        """Return histograms of each variable's gradient and momentum, in one vector.

        Each histogram has a least value, a greatest value and counts; zeros stand for a gradient or
        a momentum that a variable does not have.

        Args:
            norm: scalar, the norm of the whole gradient.
            change: holds the directions, each variable's part of g / norm(g); times the norm these
                are gradients again.
        """
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
        """Return each variable's momentum, at least float32, `None` for one that has none."""
        if not self.has_momentum:
            return [None] * len(self.variables)
        return [None if m is None else at_least_float32([m])[0] for m in values(self._momentums)]


def segment_sum(data: torch.Tensor, places: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Sum up integers by segment, without waiting for the device.

    Keras' own `segment_sum` waits, and counts in float32, so to 16 million.
    """
    sums = torch.zeros(num_segments, dtype=data.dtype, device=data.device)
    return sums.scatter_add_(0, places.long(), data)


def _divides(every: int | None, step: int) -> bool:
    """Return whether `step` is a multiple of `every`; never if that is `None`."""
    return every is not None and step % every == 0
