"""Keeps what is measured on each update of one optimizer, on the device.

Nothing here makes the host wait but what says so.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_sngm.backend.tensorflow_replicas import native_variable
from keras_sngm.backend.tensorflow_ring import Ring
from keras_sngm.backend.tensorflow_slot import arithmetic_dtype, for_arithmetic
from keras_sngm.measurements import DETAILS, HISTOGRAM, Plan, details, histogram

Local = Callable[[Any], tf.Variable]

_attached: weakref.WeakKeyDictionary[Any, list["Recorder"]] = weakref.WeakKeyDictionary()


def attached(optimizer: Any) -> list["Recorder"]:
    """The recorders of an optimizer. Not its attribute: that would be saved with it."""
    return _attached.setdefault(optimizer, [])


class Measured(NamedTuple):
    """What an update has measured by itself."""

    norm: tf.Tensor
    norms: tf.Tensor
    """One per variable, 0 where there was no gradient."""
    noise_scale: tf.Tensor | None


class Progress(NamedTuple):
    """Where a recorder's rows were read up to."""

    updates: int
    details: int
    histograms: int


class NewRows(NamedTuple):
    """What was recorded since another time.

    Attributes:
        steps: the number of each update.
        values: a row for each: norm, noise scale, and norms if these were planned.
        details: by step, a row of `DETAILS` for each variable.
        histograms: by step, histograms of each variable's gradient and momentum.
        bad_step: the first update whose gradient was not finite, or 0.
        bad_norms: the norms of the variables' gradients then.
    """

    steps: np.ndarray
    values: np.ndarray
    details: Mapping[int, np.ndarray]
    histograms: Mapping[int, np.ndarray]
    bad_step: int
    bad_norms: np.ndarray


class Recorder:
    """What one logger wants to know of one optimizer.

    Args:
        optimizer: a built Keras optimizer, not one that wraps others.
        plan: what to keep.
        momentums: its momentum for each variable that it was built with, or nothing.
        guarded: variables that are to be as they were after the last step, once none
            is taken any more. Only if the plan `stops`.
    """

    def __init__(
        self,
        optimizer: Any,
        plan: Plan,
        momentums: Sequence[keras.Variable],
        guarded: Sequence[keras.Variable],
    ) -> None:
        self.plan = plan
        self.optimizer = weakref.ref(optimizer)
        self.left_at: int | None = None
        """How often the optimizer had been called when this was detached from it."""
        self.variables: list[keras.Variable] = list(optimizer._trainable_variables)
        self.has_momentum = bool(momentums)
        self.keeps_noise_scale = getattr(optimizer, "gradient_noise_scale", None) is not None
        self._momentums = list(momentums) or [None] * len(self.variables)
        self._strategy = optimizer._distribution_strategy
        count = len(self.variables)
        self._active = self._variable((), "bool")
        self._halted = self._variable((), "bool")
        self._held = self._variable((), "int64")
        self._bad_step = self._variable((), "int64")
        self._bad_norms = self._variable((count,), "float32")
        self._latest = self._variable((), "float32")
        self._updates = Ring(self._variable, plan.updates, 2 + count * plan.per_variable)
        self._details = self._rarer_ring(plan.details_every, count * len(DETAILS))
        kinds = 2 if self.has_momentum else 1
        self._histograms = self._rarer_ring(plan.histogram_every, count * kinds * HISTOGRAM)
        self._rings = (self._updates, self._details, self._histograms)
        needs_weights = plan.details_every or plan.histogram_every
        self._before = [
            self._variable(v.shape, arithmetic_dtype(native_variable(v).dtype).name)
            for v in (self.variables if needs_weights else ())
        ]
        self._functions: dict[Hashable, Callable[..., tf.Tensor]] = {}
        self._guarded = list(guarded)
        self._backups = [self._variable(v.shape, v.dtype) for v in guarded]

    def _variable(self, shape: Sequence[int], dtype: str) -> keras.Variable:
        with self._strategy.scope():
            return keras.Variable(
                keras.initializers.Zeros(),
                shape=tuple(shape),
                dtype=dtype,
                trainable=False,
                aggregation="only_first_replica",
                synchronization="on_read",
            )

    def _rarer_ring(self, every: int | None, columns: int) -> Ring:
        if every is None:
            return Ring(self._variable, 1, 0)
        return Ring(self._variable, self.plan.updates // every + 1, columns)

    # On the host, between steps.

    def begin(self) -> Progress:
        """Record from now on. Waits for the device."""
        self._active.assign(True)
        self._halted.assign(False)
        self._bad_step.assign(0)
        for variable, backup in zip(self._guarded, self._backups, strict=True):
            backup.assign(variable)
        return Progress(*(ring.count() for ring in self._rings))

    def end(self) -> None:
        """Do no more than a graph that is traced already has to."""
        self._active.assign(False)
        self._halted.assign(False)

    def hold(self, updates: int) -> None:
        """Let a halt last for so many updates more.

        It must not outlive a `fit` that was interrupted: whatever is trained next with
        the same graph would silently stay as it is.
        """
        if self.plan.stops:
            self._held.assign(updates)

    def snapshot(self) -> list[Any]:
        """Copies of all rows, on the device."""
        return [
            *(ring.snapshot() for ring in self._rings),
            keras.ops.copy(self._bad_step),
            keras.ops.copy(self._bad_norms),
        ]

    def since(self, progress: Progress, snapshot: Sequence[Any]) -> tuple[Progress, NewRows]:
        """What came in. Waits for the device, in whatever thread this is called."""
        *of_rings, bad_step, bad_norms = snapshot
        ends, steps, rows = zip(
            *(
                ring.since(begin, copy)
                for ring, begin, copy in zip(self._rings, progress, of_rings, strict=True)
            ),
            strict=True,
        )
        count = len(self.variables)
        new = NewRows(
            steps[0],
            rows[0],
            _by_step(steps[1], rows[1], (count, len(DETAILS))),
            _by_step(steps[2], rows[2], (count, -1, HISTOGRAM)),
            int(keras.ops.convert_to_numpy(bad_step)),
            keras.ops.convert_to_numpy(bad_norms),
        )
        return Progress(*ends), new

    def latest_norm(self) -> Any:
        """The norm of the last update, a scalar on the device."""
        return keras.ops.copy(self._latest)

    def restore(self) -> None:
        """Bring back the guarded variables as they were after the last step."""
        for variable, backup in zip(self._guarded, self._backups, strict=True):
            variable.assign(backup)

    # In a training step.

    def may_step(self, local: Local) -> tf.Tensor | None:
        """Whether a step may be taken, `None` if there is no doubt."""
        if not self.plan.stops:
            return None
        return tf.logical_not(tf.logical_and(local(self._halted), local(self._held) > 0))

    def before(self, local: Local, step: tf.Tensor) -> None:
        """To be called before the update `step` is made."""
        if not self._before:
            return

        def keep() -> None:
            for variable, kept in zip(self.variables, self._before, strict=True):
                local(kept).assign(for_arithmetic(local(variable)))

        due = tf.logical_or(
            self._is_due(local, self.plan.details_every, step),
            self._is_due(local, self.plan.histogram_every, step),
        )
        tf.cond(due, keep, lambda: None)

    def after(
        self,
        local: Local,
        step: tf.Tensor,
        measured: Measured,
        directions: Callable[[Sequence[tf.Tensor]], Mapping[int, tf.Tensor]],
    ) -> None:
        """To be called after it.

        Args:
            local: what a variable is on the device in hand.
            step: int64 scalar, the number of the update.
            measured: what it has measured.
            directions: maps the weights before the update to g / norm(g), for the
                positions of those variables that have a gradient.
        """
        self._write_row(local, step, measured)
        self._note_what_is_not_finite(local, step, measured)
        weights = [tf.convert_to_tensor(local(kept)) for kept in self._before]

        def write_details() -> None:
            self._write_details(local, step, weights, directions(weights))

        def write_histograms() -> None:
            self._write_histograms(local, step, measured.norm, directions(weights))

        if self.plan.details_every is not None:
            due = self._is_due(local, self.plan.details_every, step)
            tf.cond(due, write_details, lambda: None)
        if self.plan.histogram_every is not None:
            due = self._is_due(local, self.plan.histogram_every, step)
            tf.cond(due, write_histograms, lambda: None)

    def _is_due(self, local: Local, every: int | None, step: tf.Tensor) -> tf.Tensor:
        if every is None:
            return tf.constant(False)
        return tf.logical_and(tf.convert_to_tensor(local(self._active)), step % every == 0)

    def _write_row(self, local: Local, step: tf.Tensor, measured: Measured) -> None:
        unknown = tf.constant(np.nan, tf.float32)
        noise_scale = unknown if measured.noise_scale is None else measured.noise_scale
        row = tf.stack([measured.norm, noise_scale])
        if self.plan.per_variable:
            row = tf.concat([row, measured.norms], 0)
        self._updates.write(local, step, row)
        local(self._latest).assign(measured.norm)

    def _note_what_is_not_finite(self, local: Local, step: tf.Tensor, measured: Measured) -> None:
        bad = tf.logical_not(tf.math.is_finite(measured.norm))
        bad_step, bad_norms = local(self._bad_step), local(self._bad_norms)
        first = tf.logical_and(bad, bad_step == 0)
        bad_norms.assign(tf.where(first, measured.norms, bad_norms))
        bad_step.assign(tf.where(first, step, bad_step))
        if not self.plan.stops:
            return
        halted = tf.logical_or(local(self._halted), bad)
        local(self._halted).assign(halted)
        local(self._held).assign_sub(1)
        for variable, backup in zip(self._guarded, self._backups, strict=True):
            kept = local(backup)
            kept.assign(tf.where(halted, kept, local(variable)))

    def _write_details(
        self,
        local: Local,
        step: tf.Tensor,
        weights: Sequence[tf.Tensor],
        directions: Mapping[int, tf.Tensor],
    ) -> None:
        rows = [
            self._traced_once(
                details,
                before,
                for_arithmetic(local(variable)),
                None if momentum is None else for_arithmetic(local(momentum)),
                directions.get(i),
            )
            for i, (before, variable, momentum) in enumerate(
                zip(weights, self.variables, self._momentums, strict=True)
            )
        ]
        self._details.write(local, step, tf.concat(rows, 0))

    def _write_histograms(
        self,
        local: Local,
        step: tf.Tensor,
        norm: tf.Tensor,
        directions: Mapping[int, tf.Tensor],
    ) -> None:
        rows = []
        for i, momentum in enumerate(self._momentums):
            direction = directions.get(i)
            if direction is None:
                rows.append(tf.zeros([HISTOGRAM]))
            else:
                gradient = direction * tf.cast(norm, direction.dtype)
                rows.append(self._traced_once(histogram, gradient))
            if momentum is not None:
                rows.append(self._traced_once(histogram, tf.convert_to_tensor(local(momentum))))
        self._histograms.write(local, step, tf.concat(rows, 0))

    def _traced_once(
        self, function: Callable[..., tf.Tensor], *tensors: tf.Tensor | None
    ) -> tf.Tensor:
        """Calls it as a function of the graph that variables of one shape share.

        Otherwise tracing a deep model would take many times as long.
        """
        alike = tuple(
            None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors
        )
        if (function, alike) not in self._functions:
            # One function for each shape, for TensorFlow warns of functions that it
            # traces again and again.
            self._functions[function, alike] = tf.function(
                functools.partial(function),
                autograph=False,
                experimental_attributes={"_noinline": True},
            )
        return self._functions[function, alike](*tensors)


def _by_step(steps: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    return {int(step): row.reshape(shape) for step, row in zip(steps, rows, strict=True)}
