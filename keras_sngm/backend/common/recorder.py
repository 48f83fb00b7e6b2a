"""Keeps what is measured on each update of one optimizer, on the device.

Here is what the host does between steps. How a step writes is up to the backend.
Nothing here makes the host wait but what says so.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_sngm.backend.common.optimizer import WholeModelOptimizer
from keras_sngm.backend.common.ring import Ring
from keras_sngm.measurements import DETAILS, HISTOGRAM, NOISE_MOMENTS, Plan, Rows, rows_from
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Tensor, scatter

_attached: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def attached(optimizer: Any) -> list[Any]:
    """The recorders of an optimizer. Not its attribute: that would be saved with it."""
    return _attached.setdefault(optimizer, [])


def ready(optimizer: Any) -> list[Any]:
    """Return the recorders that record the step which this optimizer is about to take."""
    recorders = attached(optimizer)
    for recorder in recorders:
        recorder.open()
    return [recorder for recorder in recorders if recorder.is_ready]


def conditions_of_step(recorders: Iterable[Any], *local: Callable[[Any], Any]) -> list[Any]:
    """Booleans on the device, all of which must be true for a step to be taken.

    Args:
        recorders: those attached to an optimizer.
        local: what a variable is on the replica that asks, where there are replicas.
    """
    return [recorder.may_step(*local) for recorder in recorders if recorder.plan.stops]


class Measured(NamedTuple):
    """What an update has measured by itself."""

    norm: Tensor
    norms: Tensor
    """One per variable, 0 where there was no gradient."""
    noise_moments: Tensor | None
    """The averages that the noise scale is the quotient of."""
    is_finite: Tensor
    """Whether all elements of the gradient are."""
    nonfinite: Tensor
    """Per variable, whether elements of its gradient are not finite."""


def measured_by(
    optimizer: Any,
    normalized: Normalization,
    indices: Sequence[int],
    local: Callable[[Any], Any] = lambda variable: variable,
) -> Measured:
    """What SNGM has measured in its last update.

    Args:
        optimizer: an SNGM.
        normalized: how it has normalized the gradient.
        positions: whose gradients these were, among all its variables.
        local: what a variable is on the replica that asks, `None` of `None`.
    """
    kept = (optimizer.gradient_norm, optimizer.gradient_norms, optimizer.noise_moments)
    norm, norms, moments = (
        None if v is None else keras.ops.convert_to_tensor(local(v)) for v in kept
    )
    nonfinite = nonfinite_mask(normalized, indices, len(optimizer._trainable_variables))
    return Measured(norm, norms, moments, normalized.is_finite, nonfinite)


def nonfinite_mask(normalized: Normalization, indices: Sequence[int], count: int) -> Tensor:
    """Return for each of `count` variables whether its gradient has elements that are not finite.

    Args:
        normalized: what was measured of some of them.
        positions: of which.
        count: how many there are.
    """
    nonfinite = keras.ops.logical_not(keras.ops.isfinite(normalized.squares))
    return scatter(nonfinite, indices, count)


class Progress(NamedTuple):
    """Where a recorder's rows were read up to."""

    updates: int
    details: int
    histograms: int


class NewRows(NamedTuple):
    """What was recorded since another time.

    Attributes:
        steps: the number of each update.
        rows: what was measured on each.
        details: by step, a row of `DETAILS` for each variable.
        histograms: by step, histograms of each variable's gradient and momentum.
        bad_step: the first update whose gradient was not finite, or 0.
        bad: for each variable, whether its gradient was not finite then.
    """

    steps: np.ndarray
    rows: Rows
    details: Mapping[int, np.ndarray]
    histograms: Mapping[int, np.ndarray]
    nonfinite_step: int
    nonfinite: np.ndarray


class RecorderBase:
    """What one logger wants to know of one optimizer.

    Args:
        optimizer: a Keras optimizer, not one that wraps others. It need not be built.
        plan: what to keep.
        guarded: returns the variables that are to be as they were after the last step,
            once none is taken any more. Called if the plan `stops`.
    """

    def __init__(
        self, optimizer: Any, plan: Plan, restorable: Callable[[], Sequence[keras.Variable]]
    ) -> None:
        self.plan = plan
        self.optimizer: Callable[[], Any] = weakref.ref(optimizer)
        self.fit_params: Any = None
        """By what the `fit` is known that this was attached in last."""
        self.is_open = False
        """Whether the variables are made."""
        self.begun_at: Progress | None = None
        """How far the rings were when recording began; `None` while it has not."""
        self._find_guarded = restorable
        self._to_hold = 0

    def open(self) -> None:
        """Make the variables and begin to record, unless that is done.

        Does nothing as long as the optimizer is not built.
        """
        optimizer = self.optimizer()
        if not self.is_open and optimizer.built:
            self._make_variables(optimizer)
            self.is_open = True
        if self.is_open and self.begun_at is None and self._can_begin():
            self.begin()

    def _can_begin(self) -> bool:
        """Return whether the guarded variables have values."""
        return True

    @property
    def is_ready(self) -> bool:
        """Whether an update can be recorded where this is asked."""
        return self.is_open

    def _make_variables(self, optimizer: Any) -> None:
        # Keras' optimizers keep other things by the name of momentum.
        momentums = optimizer.momentums if isinstance(optimizer, WholeModelOptimizer) else ()
        plan = self.plan
        self.variables: list[keras.Variable] = list(optimizer._trainable_variables)
        self.has_momentum = bool(momentums)
        self.keeps_noise_scale = getattr(optimizer, "noise_moments", None) is not None
        self._momentums = list(momentums) or [None] * len(self.variables)
        count = len(self.variables)
        self._active = self._variable((), "bool")
        self._halted = self._variable((), "bool")
        self._held = self._variable((), "int")
        self._bad_step = self._variable((), "int")
        self._bad = self._variable((count,), "bool")
        self._latest = self._variable((), "float32")
        self.updates_kept = plan.updates(count)
        columns = 1 + NOISE_MOMENTS * self.keeps_noise_scale + count * plan.per_variable
        self._updates = Ring(self._variable, self.updates_kept, columns)
        self._details = self._rarer_ring(plan.details_every, count * len(DETAILS))
        kinds = 2 if self.has_momentum else 1
        self._histograms = self._rarer_ring(plan.histogram_every, count * kinds * HISTOGRAM)
        self._rings = (self._updates, self._details, self._histograms)
        self._guarded = list(self._find_guarded()) if plan.stops else []
        self._backups = [self._variable(v.shape, v.dtype) for v in self._guarded]

    def _variable(self, shape: Sequence[int], dtype: str) -> keras.Variable:
        return keras.Variable(
            keras.initializers.Zeros(), shape=tuple(shape), dtype=dtype, trainable=False
        )

    def _rarer_ring(self, every: int | None, columns: int) -> Ring:
        if every is None:
            return Ring(self._variable, 1, 0)
        return Ring(self._variable, self.updates_kept // every + 1, columns)

    def _copy(self, variable: keras.Variable) -> Any:
        """What the last step left in one of this recorder's variables."""
        return keras.ops.copy(variable)

    def begin(self) -> None:
        """Record from now on. Waits for the device."""
        self._active.assign(True)
        self._halted.assign(False)
        self._bad_step.assign(0)
        self.hold(self._to_hold)
        self.back_up()
        counts = (int(keras.ops.convert_to_numpy(ring.count)) for ring in self._rings)
        self.begun_at = Progress(*counts)

    def back_up(self) -> None:
        """Take the guarded variables as they are for those to bring back after a stop."""
        for variable, backup in zip(self._guarded, self._backups, strict=True):
            # A copy: JAX could not take away the same array twice.
            backup.assign(keras.ops.copy(variable))

    def end(self) -> None:
        """Do no more than a graph that is traced already has to."""
        self.begun_at = None
        if self.is_open:
            self._active.assign(False)
            self._halted.assign(False)

    @property
    def one_of_several(self) -> bool:
        """Whether other processes take part in each step, so that all must take the same ones."""
        return False

    def hold(self, updates: int) -> None:
        """Let a halt last for so many updates more.

        It must not outlive a `fit` that was interrupted: whatever is trained next with
        the same graph would silently stay as it is.
        """
        self._to_hold = updates
        if self.is_open and self.plan.stops:
            self._held.assign(updates)

    def snapshot(self) -> list[Any]:
        """Copies of all rows, on the device."""
        return [
            *(ring.snapshot(self._copy) for ring in self._rings),
            self._copy(self._bad_step),
            self._copy(self._bad),
        ]

    def progress(self, snapshot: Sequence[Any]) -> Progress:
        """How far it is. Waits for the device, in whatever thread this is called."""
        return Progress(*(ring.end() for ring in snapshot[: len(self._rings)]))

    def since(self, progress: Progress, snapshot: Sequence[Any]) -> NewRows:
        """What came in. Waits for the device, in whatever thread this is called.

        Raises:
            RowsLostError: if more did than can be kept.
        """
        *of_rings, nonfinite_step, nonfinite = snapshot
        steps, rows = zip(
            *(
                ring.since(begin, copy)
                for ring, begin, copy in zip(self._rings, progress, of_rings, strict=True)
            ),
            strict=True,
        )
        count = len(self.variables)
        return NewRows(
            steps[0],
            rows_from(rows[0], self.keeps_noise_scale),
            _by_step(steps[1], rows[1], (count, len(DETAILS))),
            _by_step(steps[2], rows[2], (count, -1, HISTOGRAM)),
            int(keras.ops.convert_to_numpy(nonfinite_step)),
            keras.ops.convert_to_numpy(nonfinite),
        )

    def latest_norm(self) -> Any:
        """The norm of the last update, a scalar on the device."""
        return self._copy(self._latest)

    def restore(self) -> None:
        """Bring back the guarded variables as they were after the last step."""
        for variable, backup in zip(self._guarded, self._backups, strict=True):
            variable.assign(keras.ops.copy(backup))

    def _row(self, measured: Measured) -> Tensor:
        """Return what is kept of every update, a vector that `rows_from` can read."""
        parts = [keras.ops.reshape(measured.norm, (1,))]
        if self.keeps_noise_scale:
            parts.append(measured.noise_moments)
        if self.plan.per_variable:
            parts.append(measured.norms)
        return keras.ops.concatenate(parts)


def _by_step(steps: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    return {int(step): row.reshape(shape) for step, row in zip(steps, rows, strict=True)}
