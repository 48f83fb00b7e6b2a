"""Keeps what is measured on each update of one optimizer, as a part of TensorFlow's step."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_sngm.backend.common.recorder import Measured, RecorderBase
from keras_sngm.backend.common.ring import Ring, row_of
from keras_sngm.backend.tensorflow.replicas import native_variable
from keras_sngm.backend.tensorflow.slot import arithmetic_dtype, for_arithmetic
from keras_sngm.measurements import HISTOGRAM, details, histogram

Local = Callable[[Any], tf.Variable]


class Recorder(RecorderBase):
    """With its variables on the first replica of each device."""

    def open(self) -> None:
        """As for every backend; also while the function is traced that the optimizer is built in.

        TensorFlow traces that function twice, and gives variables their initial values in
        between. Those that are guarded are backed up then, before the first step.
        """
        if self.begun_at is None:
            with tf.init_scope():
                super().open()

    def _can_begin(self) -> bool:
        return all(native_variable(v).is_initialized() for v in self._guarded)

    def _make_variables(self, optimizer: Any) -> None:
        self._strategy = optimizer._distribution_strategy
        super()._make_variables(optimizer)
        needs_weights = self.plan.details_every or self.plan.histogram_every
        self._before = [
            self._variable(v.shape, arithmetic_dtype(native_variable(v).dtype).name)
            for v in (self.variables if needs_weights else ())
        ]
        self._functions: dict[Hashable, Callable[..., tf.Tensor]] = {}

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

    def may_step(self, local: Local) -> tf.Tensor:
        """Whether a step may be taken. Asked only if the plan is to stop."""
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
        # At the end of a dataset of unknown length TensorFlow runs whatever does not wait for data.
        with tf.control_dependencies([measured.norm]):
            self._write_row(local, step, measured)
            self._note_what_is_not_finite(local, step, measured)
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
        if every is None:
            return tf.constant(False)
        return tf.logical_and(tf.convert_to_tensor(local(self._active)), step % every == 0)

    def _write_row(self, local: Local, step: tf.Tensor, measured: Measured) -> None:
        _write(self._updates, local, step, self._row(measured))
        local(self._latest).assign(measured.norm)

    def _note_what_is_not_finite(self, local: Local, step: tf.Tensor, measured: Measured) -> None:
        nonfinite = tf.logical_not(measured.is_finite)
        nonfinite_step, bad_ones = local(self._bad_step), local(self._bad)
        first = tf.logical_and(nonfinite, nonfinite_step == 0)
        bad_ones.assign(tf.where(first, measured.nonfinite, bad_ones))
        nonfinite_step.assign(tf.where(first, step, nonfinite_step))
        if not self.plan.stops:
            return
        halted = tf.logical_or(local(self._halted), nonfinite)
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
        _write(self._details, local, step, tf.concat(rows, 0))

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
        _write(self._histograms, local, step, tf.concat(rows, 0))

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


def _write(ring: Ring, local: Local, step: tf.Tensor, values: tf.Tensor) -> None:
    count, rows = local(ring.count), local(ring.rows)
    row = row_of(step, values)[tf.newaxis]
    rows.scatter_update(tf.IndexedSlices(row, (count % ring.length)[tf.newaxis]))
    count.assign_add(1)
