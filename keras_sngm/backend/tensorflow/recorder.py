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

Local = Callable[[Any], tf.Variable]
"""A function from a variable to the copy of it that one replica has."""


class Recorder(RecorderBase):
    """Recorder that keeps its variables on every replica and writes those of the first.

    In its methods `local` returns the first replica's copy of a variable.
    """

    def open(self) -> None:
        """Create the variables and begin to record, unless that is done.

        Does nothing as long as the optimizer is not built. Keras may build it inside of a function
        that is traced; TensorFlow traces that function twice, and gives variables their initial
        values in between. The variables to be restored are backed up then, before the first step.
        """
        if self.begun_at is None:
            with tf.init_scope():
                super().open()

    def _can_begin(self) -> bool:
        """Return whether the variables to be restored have values."""
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

    def may_step(self, local: Local) -> tf.Tensor:
        """Return a boolean scalar: whether the optimizer may take its next step.

        It may not once a gradient was not finite, for as many updates as `limit_halt` has set.
        To be asked only if the plan `stops`. `local` maps a variable to the first replica's copy.
        """
        return tf.logical_not(
            tf.logical_and(local(self._is_halted), local(self._halt_updates_left) > 0)
        )

    def before(self, local: Local, step: tf.Tensor) -> None:
        """Keep the weights, if details or histograms are due. To be called before an update.

        Args:
            local: returns the first replica's copy of a variable.
            step: int64 scalar, the number of the update.
        """
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
        """Record an update that was made.

        Args:
            local: returns the first replica's copy of a variable.
            step: int64 scalar, the number of the update.
            measured: what was measured on its gradient.
            directions: maps the weights before the update to g / norm(g) by index, for the
                variables that have a gradient.
        """
        # At the end of a dataset of unknown length TensorFlow runs whatever does not wait for data.
        with tf.control_dependencies([measured.norm]):
            self._write_row(local, step, measured)
            self._record_nonfinite(local, step, measured)
            weights = [tf.convert_to_tensor(local(kept)) for kept in self._before]

            def write_details() -> None:
                self._write_details(local, step, weights, directions(weights))

            def write_histograms() -> None:
                self._write_histograms(local, step, measured.norm, directions(weights))

            rarer = (
                (self.plan.details_every, write_details),
                (self.plan.histogram_every, write_histograms),
            )
            for every, write in rarer:
                if every is not None:
                    tf.cond(self._is_due(local, every, step), write, lambda: None)

    def _is_due(self, local: Local, every: int | None, step: tf.Tensor) -> tf.Tensor:
        """Return a boolean scalar: whether rows written every `every` updates are due at `step`."""
        if every is None:
            return tf.constant(False)
        return tf.logical_and(tf.convert_to_tensor(local(self._active)), step % every == 0)

    def _write_row(self, local: Local, step: tf.Tensor, measured: Measured) -> None:
        """Append the row of an update to the ring buffer of updates."""
        _write(self._updates, local, step, self._row(measured))
        local(self._latest).assign(measured.norm)

    def _record_nonfinite(self, local: Local, step: tf.Tensor, measured: Measured) -> None:
        """Note the first update whose gradient is not finite; if the plan `stops`, begin a halt.

        Until then the variables to be restored are backed up.
        """
        nonfinite = tf.logical_not(measured.is_finite)
        nonfinite_step, nonfinite_ones = local(self._nonfinite_step), local(self._nonfinite)
        first = tf.logical_and(nonfinite, nonfinite_step == 0)
        nonfinite_ones.assign(tf.where(first, measured.nonfinite, nonfinite_ones))
        nonfinite_step.assign(tf.where(first, step, nonfinite_step))
        if not self.plan.stops:
            return
        halted = tf.logical_or(local(self._is_halted), nonfinite)
        local(self._is_halted).assign(halted)
        local(self._halt_updates_left).assign_sub(1)
        for variable, backup in zip(self._restorable, self._backups, strict=True):
            kept = local(backup)
            kept.assign(tf.where(halted, kept, local(variable)))

    def _write_details(
        self,
        local: Local,
        step: tf.Tensor,
        weights: Sequence[tf.Tensor],
        directions: Mapping[int, tf.Tensor],
    ) -> None:
        """Append the `DETAILS` of all variables to their ring buffer."""
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
        _write(self._details, local, step, tf.concat(rows, 0))

    def _write_histograms(
        self,
        local: Local,
        step: tf.Tensor,
        norm: tf.Tensor,
        directions: Mapping[int, tf.Tensor],
    ) -> None:
        """Append histograms of each variable's gradient and momentum to their ring buffer."""
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
        _write(self._histograms, local, step, tf.concat(rows, 0))

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


def _write(ring: Ring, local: Local, step: tf.Tensor, values: tf.Tensor) -> None:
    """Append a row to a ring buffer."""
    count, rows = local(ring.count), local(ring.rows)
    row = row_of(step, values)[tf.newaxis]
    rows.scatter_update(tf.IndexedSlices(row, (count % ring.length)[tf.newaxis]))
    count.assign_add(1)
