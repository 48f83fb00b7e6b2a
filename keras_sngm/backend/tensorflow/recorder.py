"""Recorder of the updates of one optimizer, as a part of TensorFlow's training step."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_sngm.backend.common.measured import Measured
from keras_sngm.backend.common.recorder import RecorderBase
from keras_sngm.backend.common.ring import Ring, row_of
from keras_sngm.backend.tensorflow.replicas import native_variable
from keras_sngm.backend.tensorflow.tensors import arithmetic_dtype, for_arithmetic
from keras_sngm.measurements import HISTOGRAM, details, histogram

OnReplica = Callable[[Any], tf.Variable]
"""A function from a variable to the copy of it that one replica has."""


class Recorder(RecorderBase):
    """Recorder that keeps its variables on every replica and writes those of the first.

    In its methods `on_replica` maps a variable to the first replica's copy of it. `DETAILS` are
    five numbers on each variable around an update, such as the norm of its change; a histogram has
    `HISTOGRAM` elements: least value, greatest value, counts. In a halt no step is taken, as a
    gradient was not finite; the variables to be restored then, the model's weights that are not
    trainable, are backed up in each step before.
    """

    def open(self) -> None:
        """Create the variables and begin to record, unless that is done.

        Does nothing as long as the optimizer is not built. Keras may build it inside of a function
        that is traced; TensorFlow traces that function twice, and gives variables their initial
        values in between. So recording begins, with a backup of the variables that a halt restores,
        when a later call finds that these have values, before the first step.
        """
        if self.begun_at is None:
            with tf.init_scope():
                super().open()

    def _can_begin(self) -> bool:
        """Return whether recording can begin: the variables that a halt restores have values."""
        return all(native_variable(v).is_initialized() for v in self._restorable)

    def _make_variables(self, optimizer: Any) -> None:
        """Create the ring buffers and all other variables, also those that keep weights."""
        self._strategy = optimizer._distribution_strategy
        super()._make_variables(optimizer)
        needs_weights = self.plan.details_every or self.plan.histogram_every
        self._before = [
            self._variable(v.shape, arithmetic_dtype(native_variable(v).dtype).name)
            for v in (self.variables if needs_weights else ())
        ]
        self._functions: dict[Hashable, Callable[..., tf.Tensor]] = {}

    def _variable(self, shape: Sequence[int], dtype: str) -> keras.Variable:
        """Create a variable of zeros, which each replica has for itself."""
        with self._strategy.scope():
            return keras.Variable(
                keras.initializers.Zeros(),
                shape=tuple(shape),
                dtype=dtype,
                trainable=False,
                aggregation="only_first_replica",
                synchronization="on_read",
            )

    def may_step(self, on_replica: OnReplica) -> tf.Tensor:
        """Return a boolean scalar: whether the optimizer may take its next step.

        It may not once a gradient was not finite, for as many updates as `limit_halt` has set.
        To be asked only if the plan `stops`. `on_replica` maps a variable to the first
        replica's copy of it.
        """
        return tf.logical_not(
            tf.logical_and(on_replica(self._is_halted), on_replica(self._halt_updates_left) > 0)
        )

    def before(self, on_replica: OnReplica, step: tf.Tensor) -> None:
        """Keep the weights, if details or histograms are due. To be called before an update.

        Args:
            on_replica: maps a variable to the first replica's copy of it.
            step: int64 scalar, the number of the update.
        """
        if not self._before:
            return

        def keep() -> None:
            """Copy the weights of all variables."""
            for variable, kept in zip(self.variables, self._before, strict=True):
                on_replica(kept).assign(for_arithmetic(on_replica(variable)))

        due = tf.logical_or(
            self._is_due(on_replica, self.plan.details_every, step),
            self._is_due(on_replica, self.plan.histogram_every, step),
        )
        tf.cond(due, keep, lambda: None)

    def after(
        self,
        on_replica: OnReplica,
        step: tf.Tensor,
        measured: Measured,
        directions: Callable[[Sequence[tf.Tensor]], Mapping[int, tf.Tensor]],
    ) -> None:
        """Record an update that was made.

        Args:
            on_replica: maps a variable to the first replica's copy of it.
            step: int64 scalar, the number of the update.
            measured: what was measured on its gradient.
            directions: maps the weights before the update to g / norm(g) by index, for the
                variables that have a gradient.
        """
        # At the end of a dataset of unknown length TensorFlow runs whatever does not wait for data.
        with tf.control_dependencies([measured.norm]):
            self._write_row(on_replica, step, measured)
            self._record_nonfinite(on_replica, step, measured)
            weights = [tf.convert_to_tensor(on_replica(kept)) for kept in self._before]

            def write_details() -> None:
                """Append the details of this update to their ring buffer."""
                self._write_details(on_replica, step, weights, directions(weights))

            def write_histograms() -> None:
                """Append the histograms of this update to their ring buffer."""
                self._write_histograms(on_replica, step, measured.norm, directions(weights))

            rarer = (
                (self.plan.details_every, write_details),
                (self.plan.histogram_every, write_histograms),
            )
            for every, write in rarer:
                if every is not None:
                    tf.cond(self._is_due(on_replica, every, step), write, lambda: None)

    def _is_due(self, on_replica: OnReplica, every: int | None, step: tf.Tensor) -> tf.Tensor:
        """Return a boolean scalar: whether to write rows of a kind at `step`, if recording.

        Args:
            on_replica: maps a variable to the first replica's copy of it.
            every: number of updates from one row of the kind to the next; `None` if there are none.
            step: int64 scalar, the number of the update.
        """
        if every is None:
            return tf.constant(False)
        return tf.logical_and(tf.convert_to_tensor(on_replica(self._active)), step % every == 0)

    def _write_row(self, on_replica: OnReplica, step: tf.Tensor, measured: Measured) -> None:
        """Append the row of an update to the ring buffer of updates; keep its norm as the latest.

        Args:
            on_replica: maps a variable to the first replica's copy of it.
            step: int64 scalar, the number of the update.
            measured: what was measured on its gradient.
        """
        _write(self._updates, on_replica, step, self._row(measured))
        on_replica(self._latest).assign(measured.norm)

    def _record_nonfinite(self, on_replica: OnReplica, step: tf.Tensor, measured: Measured) -> None:
        """Note the first update whose gradient is not finite; if the plan `stops`, begin a halt.

        In a halt no step is taken, for as many updates as are left to it, which are counted down in
        each update. Until it begins the variables to be restored are backed up in each update.

        Args:
            on_replica: maps a variable to the first replica's copy of it.
            step: int64 scalar, the number of the update.
            measured: what was measured on its gradient.
        """
        nonfinite = tf.logical_not(measured.is_finite)
        nonfinite_step, nonfinite_ones = (
            on_replica(self._nonfinite_step),
            on_replica(self._nonfinite),
        )
        first = tf.logical_and(nonfinite, nonfinite_step == 0)
        nonfinite_ones.assign(tf.where(first, measured.nonfinite, nonfinite_ones))
        nonfinite_step.assign(tf.where(first, step, nonfinite_step))
        if not self.plan.stops:
            return
        halted = tf.logical_or(on_replica(self._is_halted), nonfinite)
        on_replica(self._is_halted).assign(halted)
        on_replica(self._halt_updates_left).assign_sub(1)
        for variable, backup in zip(self._restorable, self._backups, strict=True):
            kept = on_replica(backup)
            kept.assign(tf.where(halted, kept, on_replica(variable)))

    def _write_details(
        self,
        on_replica: OnReplica,
        step: tf.Tensor,
        weights: Sequence[tf.Tensor],
        directions: Mapping[int, tf.Tensor],
    ) -> None:
        """Append the `DETAILS` of all variables, in one row, to their ring buffer.

        These are norms of the weight, of its update and of its momentum, the inner product of
        momentum and direction, and the norm of the direction; 0 for what a variable does not have.

        Args:
            on_replica: maps a variable to the first replica's copy of it.
            step: int64 scalar, the number of the update.
            weights: the weights of all variables before the update.
            directions: each variable's part of g / norm(g), by its index, if it has a gradient.
        """
        rows = [
            self._traced_once(
                details,
                before,
                for_arithmetic(on_replica(variable)),
                None if momentum is None else for_arithmetic(on_replica(momentum)),
                directions.get(i),
            )
            for i, (before, variable, momentum) in enumerate(
                zip(weights, self.variables, self._momentums, strict=True)
            )
        ]
        _write(self._details, on_replica, step, tf.concat(rows, 0))

    def _write_histograms(
        self,
        on_replica: OnReplica,
        step: tf.Tensor,
        norm: tf.Tensor,
        directions: Mapping[int, tf.Tensor],
    ) -> None:
        """Append histograms of each variable's gradient and momentum to their ring buffer.

        Each histogram has a least value, a greatest value and counts; zeros stand for a gradient
        that a variable does not have.

        Args:
            on_replica: maps a variable to the first replica's copy of it.
            step: int64 scalar, the number of the update.
            norm: scalar, the norm of the whole gradient.
            directions: each variable's part of g / norm(g), by its index, if it has a gradient.
                Times the norm these are gradients again.
        """
        rows = []
        for i, momentum in enumerate(self._momentums):
            direction = directions.get(i)
            if direction is None:
                rows.append(tf.zeros([HISTOGRAM]))
            else:
                gradient = direction * tf.cast(norm, direction.dtype)
                rows.append(self._traced_once(histogram, gradient))
            if momentum is not None:
                rows.append(
                    self._traced_once(histogram, tf.convert_to_tensor(on_replica(momentum)))
                )
        _write(self._histograms, on_replica, step, tf.concat(rows, 0))

    def _traced_once(
        self, function: Callable[..., tf.Tensor], *tensors: tf.Tensor | None
    ) -> tf.Tensor:
        """Call a `tf.function` of `function`, traced once for all tensors that are alike.

        Otherwise tracing a deep model would take many times as long.
        """
        alike = tuple(
            None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors
        )
        if (function, alike) not in self._functions:
            # TensorFlow warns of a function that it traces again and again, so each shape has
            # a function of its own.
            self._functions[function, alike] = tf.function(
                functools.partial(function),
                autograph=False,
                experimental_attributes={"_noinline": True},
            )
        return self._functions[function, alike](*tensors)


def _write(ring: Ring, on_replica: OnReplica, step: tf.Tensor, values: tf.Tensor) -> None:
    """Append a row to a ring buffer, in the place of the oldest if it is full.

    Args:
        ring: the ring buffer.
        on_replica: maps a variable to the first replica's copy of it.
        step: int64 scalar, the number of the update, which the row begins with.
        values: vector, the rest of the row.
    """
    count, rows = on_replica(ring.count), on_replica(ring.rows)
    row = row_of(step, values)[tf.newaxis]
    rows.scatter_update(tf.IndexedSlices(row, (count % ring.length)[tf.newaxis]))
    count.assign_add(1)
