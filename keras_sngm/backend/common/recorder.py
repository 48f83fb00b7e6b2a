"""Recorders, which keep what is measured on each update of one optimizer on the device.

Here is what the host does between steps; each backend writes rows in its own way.
A function makes the host wait for the device only if its docstring says so.

The variables of a recorder and what the host does with them are in one file.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_sngm.backend.common.measured import Measured
from keras_sngm.backend.common.optimizer import WholeModelOptimizer
from keras_sngm.backend.common.ring import Ring
from keras_sngm.measurements import DETAILS, HISTOGRAM, NOISE_MOMENTS, Plan, Rows, rows_from
from keras_sngm.update_rule import Tensor

_attached: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def attached_recorders(optimizer: Any) -> list[Any]:
    """Return the list of recorders attached to an optimizer, to read or to change.

    It is not an attribute of the optimizer, which would be saved with it.
    """
    return _attached.setdefault(optimizer, [])


def ready_recorders(optimizer: Any) -> list[Any]:
    """Return the recorders that can record the step which this optimizer is about to take.

    Recorders whose optimizer has been built since they were attached create their variables.
    """
    recorders = attached_recorders(optimizer)
    for recorder in recorders:
        recorder.open()
    return [recorder for recorder in recorders if recorder.is_ready]


def conditions_of_step(recorders: Iterable[Any], *on_replica: Callable[[Any], Any]) -> list[Any]:
    """Return booleans on the device, all of which must be true for a step to be taken.

    There is one for each recorder whose plan stops at a gradient that is not finite.

    Args:
        recorders: recorders attached to one optimizer.
        on_replica: maps a variable to this replica's copy of it; only on backends with replicas.
    """
    return [recorder.may_step(*on_replica) for recorder in recorders if recorder.plan.stops]


class Progress(NamedTuple):
    """Number of rows that were ever written to each ring buffer of a recorder, at some time."""

    updates: int
    details: int
    histograms: int


class NewRows(NamedTuple):
    """Everything that one recorder has recorded since an earlier time, on the host.

    Attributes:
        steps: vector, the number of each update.
        rows: the gradient norms and noise scale of each update.
        details: for some steps, a matrix with a row for each variable: its norm, that of the
            update, of its momentum, the inner product of momentum and direction, and the norm of
            the direction, as `measurements.DETAILS` names them.
        histograms: for some steps, an array [variable, kind, :] with histograms of the gradient
            and, if there is one, of the momentum: least value, greatest value, counts.
        nonfinite_step: number of the first update whose gradient was not finite, or 0.
        nonfinite: boolean vector, which variables had a gradient in that update that was not
            finite; all `False` if there was no such update.
    """

    steps: np.ndarray
    rows: Rows
    details: Mapping[int, np.ndarray]
    histograms: Mapping[int, np.ndarray]
    nonfinite_step: int
    nonfinite: np.ndarray


class RecorderBase:
    """Recorder of one optimizer: variables on the device, and what the host does with them.

    After a gradient that is not finite, a plan that `stops` has the device take no step any
    more; that is called a halt.

    Args:
        optimizer: a Keras optimizer, not one that wraps others. It need not be built.
        plan: what to keep.
        restorable: returns the variables, besides the optimizer's, that are to be restored
            to their values after the last step before a halt. Called if the plan `stops`.
    """

    def __init__(
        self, optimizer: Any, plan: Plan, restorable: Callable[[], Sequence[keras.Variable]]
    ) -> None:
        self.plan = plan
        self.optimizer: Callable[[], Any] = weakref.ref(optimizer)
        self.fit_params: Any = None
        """The `callback.params` of the `fit()` call that attached this recorder last."""
        self.is_open = False
        """Whether this recorder has created its variables."""
        self.begun_at: Progress | None = None
        """The number of rows in each ring buffer when recording began; `None` while it has not."""
        self._find_restorable = restorable
        self._halt_limit = 0

    def open(self) -> None:
        """Create the variables, and begin to record once those to be restored have values.

        Does what is not done yet, and nothing as long as the optimizer is not built.
        """
        optimizer = self.optimizer()
        if not self.is_open and optimizer.built:
            self._make_variables(optimizer)
            self.is_open = True
        if self.is_open and self.begun_at is None and self._can_begin():
            self.begin()

    def _can_begin(self) -> bool:
        """Return whether recording can begin: the variables that a halt restores have values."""
        return True

    @property
    def is_ready(self) -> bool:
        """Return whether the code that asks, which may be traced, can record an update."""
        return self.is_open

    def _make_variables(self, optimizer: Any) -> None:
        """Create the ring buffers and all other variables for an optimizer that is built.

        Besides the ring buffers of updates, details and histograms there are on the device: whether
        recording goes on; whether a halt, in which no step is taken, has begun, and how many
        updates it may still last; the number of the first update whose gradient was not
        finite, and which variables' gradients were not; the latest norm; and backups of what a halt
        restores.
        """
        # Some of Keras' optimizers have an attribute `momentums` that is something else.
        momentums = optimizer.momentums if isinstance(optimizer, WholeModelOptimizer) else ()
        plan = self.plan
        self.variables: list[keras.Variable] = list(optimizer._trainable_variables)
        self.has_momentum = bool(momentums)
        self.keeps_noise_scale = getattr(optimizer, "noise_moments", None) is not None
        self._momentums = list(momentums) or [None] * len(self.variables)
        count = len(self.variables)
        self._active = self._variable((), "bool")
        self._is_halted = self._variable((), "bool")
        self._halt_updates_left = self._variable((), "int")
        self._nonfinite_step = self._variable((), "int")
        self._nonfinite = self._variable((count,), "bool")
        self._latest = self._variable((), "float32")
        self.updates_kept = plan.updates(count)
        columns = 1 + NOISE_MOMENTS * self.keeps_noise_scale + count * plan.per_variable
        self._updates = Ring(self._variable, self.updates_kept, columns)
        self._details = self._ring_every(plan.details_every, count * len(DETAILS))
        kinds = 2 if self.has_momentum else 1
        self._histograms = self._ring_every(plan.histogram_every, count * kinds * HISTOGRAM)
        self._rings = (self._updates, self._details, self._histograms)
        self._restorable = list(self._find_restorable()) if plan.stops else []
        self._backups = [self._variable(v.shape, v.dtype) for v in self._restorable]

    def _variable(self, shape: Sequence[int], dtype: str) -> keras.Variable:
        """Create a variable of zeros that is not trained."""
        return keras.Variable(
            keras.initializers.Zeros(), shape=tuple(shape), dtype=dtype, trainable=False
        )

    def _ring_every(self, every: int | None, columns: int) -> Ring:
        """Create a ring buffer for rows that are written every `every` updates.

        Args:
            every: number of updates from one row to the next. `None` gives a ring that is not used,
                with one row.
            columns: number of values in a row.
        """
        if every is None:
            return Ring(self._variable, 1, 0)
        return Ring(self._variable, self.updates_kept // every + 1, columns)

    def _copy(self, variable: keras.Variable) -> Any:
        """Return a copy on the device of one of this recorder's variables."""
        return keras.ops.copy(variable)

    def begin(self) -> None:
        """Record from the next update on. Waits for the device.

        No halt, in which no step is taken, is in force any more; what one restores is backed up.
        """
        self._active.assign(True)
        self._is_halted.assign(False)
        self._nonfinite_step.assign(0)
        self.limit_halt(self._halt_limit)
        self.back_up()
        counts = (int(keras.ops.convert_to_numpy(ring.count)) for ring in self._rings)
        self.begun_at = Progress(*counts)

    def back_up(self) -> None:
        """Back up the variables that are to be restored after a halt, with their present values."""
        for variable, backup in zip(self._restorable, self._backups, strict=True):
            # JAX cannot donate one buffer twice, so the backup is a copy.
            backup.assign(keras.ops.copy(variable))

    def end(self) -> None:
        """Stop recording details and withholding steps, also in compiled functions still in use.

        These go on to write the rows of updates, which costs next to nothing.
        """
        self.begun_at = None
        if self.is_open:
            self._active.assign(False)
            self._is_halted.assign(False)

    @property
    def has_other_processes(self) -> bool:
        """Return whether other processes take part in each step, and so must take the same ones."""
        return False

    def limit_halt(self, updates: int) -> None:
        """Let a halt that has begun, or begins, last for at most `updates` more updates.

        In a halt no step is taken, as a gradient was not finite. It must not outlive a `fit` that
        was interrupted: whatever is trained next with the same compiled function would silently
        stay as it is.
        """
        self._halt_limit = updates
        if self.is_open and self.plan.stops:
            self._halt_updates_left.assign(updates)

    def snapshot(self) -> list[Any]:
        """Return copies, on the device, of all that was recorded, for `progress` and `new_rows`.

        Returns:
            A `Snapshot` of each ring buffer; the number of the first update whose gradient was not
            finite, 0 for none; and a boolean vector, which variables' gradients were not.
        """
        return [
            *(ring.snapshot(self._copy) for ring in self._rings),
            self._copy(self._nonfinite_step),
            self._copy(self._nonfinite),
        ]

    def progress(self, snapshot: Sequence[Any]) -> Progress:
        """Return how many rows were ever written to each ring buffer until a snapshot.

        Waits for the device. May be called in any thread.

        Args:
            snapshot: copies of the recorder's variables, as the method `snapshot` returns them.
        """
        return Progress(*(ring.end() for ring in snapshot[: len(self._rings)]))

    def new_rows(self, progress: Progress, snapshot: Sequence[Any]) -> NewRows:
        """Return what was recorded between an earlier time and a snapshot. Waits for the device.

        May be called in any thread.

        Args:
            progress: the number of rows in each ring buffer at the earlier time.
            snapshot: copies of the recorder's variables, as the method `snapshot` returns them.

        Returns:
            The number and the measurements of each update, details and histograms by the number of
            theirs, the number of the first update ever whose gradient was not finite (0 for none),
            and which variables' gradients were not.

        Raises:
            RowsLostError: if more rows were written than can be kept.
        """
        *of_rings, nonfinite_step, nonfinite = snapshot
        steps, rows = zip(
            *(
                ring.new_rows(begin, copy)
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
        """Return the gradient norm of the last update, a scalar on the device."""
        return self._copy(self._latest)

    def restore(self) -> None:
        """Restore variables to their values after the last step whose gradient was finite."""
        for variable, backup in zip(self._restorable, self._backups, strict=True):
            variable.assign(keras.ops.copy(backup))

    def _row(self, measured: Measured) -> Tensor:
        """Return the row of one update, a vector in the layout that `rows_from` reads."""
        parts = [keras.ops.reshape(measured.norm, (1,))]
        if self.keeps_noise_scale:
            parts.append(measured.noise_moments)
        if self.plan.per_variable:
            parts.append(measured.norms)
        return keras.ops.concatenate(parts)


def _by_step(steps: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Return a dictionary from each step to its row, reshaped to `shape`."""
    return {int(step): row.reshape(shape) for step, row in zip(steps, rows, strict=True)}
