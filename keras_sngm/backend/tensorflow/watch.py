"""Attaching of recorders to the optimizers of a model on TensorFlow.

SNGM calls its recorders itself, where it has summed up the gradients. The `apply` of
any other optimizer is wrapped while a recorder is attached to it.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework.ops import get_default_graph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from keras_sngm.backend.common import recorded_apply, watch
from keras_sngm.backend.common.measured import Measured
from keras_sngm.backend.common.recorder import (
    attached_recorders,
    conditions_of_step,
    ready_recorders,
)
from keras_sngm.backend.tensorflow import norm
from keras_sngm.backend.tensorflow.recorder import Recorder
from keras_sngm.backend.tensorflow.replicas import OwnReplica
from keras_sngm.backend.tensorflow.tensors import (
    arithmetic_dtype,
    dense,
    is_accelerator,
    of_known_shape,
    widest,
)
from keras_sngm.normalization import Normalization


class _TrainFunction:
    """Permanent replacement of a model's training function that knows which recorders it calls.

    Attributes:
        recorders: the recorders that were attached in each call so far, so that every graph
            that was traced calls them. `None` before the first call.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        self._function = model.train_function
        self.recorders: list[Recorder] | None = None

    def __call__(self, iterator: Any) -> Any:
        """Train on the next data, and note which recorders were attached meanwhile."""
        try:
            return self._function(iterator)
        finally:
            now = watch.recorders_of(self._model().optimizer)
            self.recorders = [r for r in now if self.recorders is None or r in self.recorders]


def _is_new(train_function: Any) -> bool:
    """Return whether a function is a `_TrainFunction` that was never called.

    Its first call, which traces it, will call all recorders that are attached then.
    """
    return isinstance(train_function, _TrainFunction) and train_function.recorders is None


def _recorders_known_to(train_function: Any) -> list[Recorder]:
    """Return the recorders that all graphs of a training function call."""
    return getattr(train_function, "recorders", None) or []


def _is_attached(recorder: Recorder) -> bool:
    """Return whether a recorder is attached to its optimizer."""
    return recorder in attached_recorders(recorder.optimizer())


class _RecordedApply(recorded_apply.RecordedApply):
    """Replacement of an optimizer's `apply` that records, on TensorFlow.

    It sums up the gradients of all replicas once more in each training step: where Keras does
    it, nobody else can see the result. A recorder that stops training at a gradient that is not
    finite gives a condition, which is false from then on.
    """

    def _update(
        self, inputs: recorded_apply.UpdateInputs, gradients: list[Any], variables: list[Any] | None
    ) -> None:
        """Record the gradients if this call ends an update, and apply them to the variables.

        Args:
            inputs: the gradients that are not `None`, with their variables and the indices of
                these.
            gradients: the gradients of this call.
            variables: the variables of this call, or `None` for all of the optimizer's.
        """
        optimizer = self._optimizer
        weights, indices = inputs.variables, inputs.indices
        replicas = OwnReplica(tf.distribute.get_replica_context())

        def on_replica(value: Any) -> Any:
            """Return this replica's copy of a variable, or its part of a gradient."""
            return replicas.parts(value)[0]

        final = [
            self._gradient_of_update(gradient, weight, on_replica)
            for gradient, weight in zip(inputs.gradients, weights, strict=True)
        ]
        summed = [
            dense(gradient, weight.shape)
            for gradient, weight in zip(replicas.sums(final), weights, strict=True)
        ]
        normalized = _normalization_of(summed, on_replica(weights[0]).device)
        measured, directions = recorded_apply.measure(
            normalized, summed, indices, len(optimizer._trainable_variables)
        )
        step = tf.cast(optimizer.iterations, tf.int64) + 1
        recorders = ready_recorders(optimizer)
        are_due = [self._is_due(recorder, measured) for recorder in recorders]
        for recorder, is_due in zip(recorders, are_due, strict=True):
            _run_if(is_due, functools.partial(recorder.before, on_replica, step))
        self._apply_unless_stopped(recorders, on_replica, measured, gradients, variables)
        for recorder, is_due in zip(recorders, are_due, strict=True):
            _run_if(
                is_due,
                functools.partial(
                    recorder.after, on_replica, step, measured, lambda _: directions()
                ),
            )

    def _gradient_of_update(
        self, gradient: Any, variable: Any, on_replica: Callable[[Any], Any]
    ) -> Any:
        """Return this replica's part of the gradient that the next update is made with.

        It is unscaled and averaged over micro-batches, which takes this call for the last of them.

        Args:
            gradient: the gradient of a variable in this call.
            variable: the variable.
            on_replica: maps a variable to this replica's copy of it.
        """
        optimizer = self._optimizer
        gradient = of_known_shape(gradient, variable.shape)
        dtype = arithmetic_dtype(gradient.dtype)
        if optimizer.gradient_accumulation_steps:
            gradient = dense(gradient, variable.shape)
        gradient = tf.cast(gradient, dtype)
        factor = optimizer.loss_scale_factor or 1.0
        if isinstance(gradient, tf.IndexedSlices):
            values = gradient.values / factor
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        gradient = gradient / factor
        if optimizer.gradient_accumulation_steps:
            index = optimizer._get_variable_index(variable)
            before = tf.cast(on_replica(optimizer._accumulated_gradients[index]), dtype)
            gradient = (before + gradient) / optimizer.gradient_accumulation_steps
        return gradient

    def _is_due(self, recorder: Recorder, measured: Measured) -> tf.Tensor | None:
        """Return a boolean scalar, whether this call ends an update; `None` if every call does.

        For a recorder that stops training, a gradient that is not finite counts as the end, too.
        """
        micro_batches = self._optimizer.gradient_accumulation_steps
        if micro_batches is None:
            return None
        is_update = (self._optimizer._iterations + 1) % micro_batches == 0
        if recorder.plan.stops:
            is_update |= tf.logical_not(measured.is_finite)
        return is_update

    def _apply_unless_stopped(
        self,
        recorders: Sequence[Recorder],
        on_replica: Callable[[Any], Any],
        measured: Measured,
        gradients: list[Any],
        variables: list[Any] | None,
    ) -> None:
        """Apply the gradients, unless a recorder has stopped training or stops it now.

        It stops at a gradient that is not finite.

        Args:
            recorders: the recorders of this optimizer.
            on_replica: maps a variable to this replica's copy of it.
            measured: what was measured on the gradient of this call.
            gradients: the gradients of this call.
            variables: the variables of this call, or `None` for all of the optimizer's.
        """
        conditions = conditions_of_step(recorders, on_replica)
        if not conditions:
            self._apply(gradients, variables)
            return
        may_step = tf.reduce_all([*conditions, measured.is_finite])
        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            _run_if(may_step, lambda: self._apply(gradients, variables))
            return

        def on_all_replicas(strategy: Any, may_step: Any, gradients: Any) -> None:
            """Apply the gradients of all replicas if a step may be taken: all agree on that."""
            _run_if(
                strategy.experimental_local_results(may_step)[0],
                lambda: strategy.extended.call_for_each_replica(
                    lambda gradients: self._apply(gradients, variables), args=(gradients,)
                ),
            )

        # A `tf.cond` may let replicas communicate only in the cross-replica context.
        tf.distribute.get_replica_context().merge_call(
            tf.autograph.experimental.do_not_convert(on_all_replicas), args=(may_step, gradients)
        )


def _normalization_of(gradients: Sequence[tf.Tensor], device: str) -> Normalization:
    """Compute how to normalize gradients of one device as they are: no decay, no clipping.

    Args:
        gradients: one tensor per variable.
        device: name of the device.
    """
    return norm.normalized_on(
        is_accelerator(device),
        GraphOrParentsInXlaContext(get_default_graph()),
        recorded_apply.PLAIN_RULE,
        [tf.cast(gradient, widest(gradients)) for gradient in gradients],
        [gradient.shape.num_elements() for gradient in gradients],
    )


def _run_if(condition: tf.Tensor | None, action: Callable[[], Any]) -> None:
    """Call an action if a condition holds, in the graph; always if the condition is `None`."""

    def act() -> None:
        action()

    if condition is None:
        act()
    else:
        tf.cond(condition, act, lambda: None)


class Attachment(watch.Attachment):
    """Attachment of one logger's recorders to the optimizers of a model, on TensorFlow.

    Recorders that the training function was traced with, and that are no longer attached, are used
    again if they record the same. Where there are none the training function is made anew, and
    traced by its next call.
    """

    recorder_type = Recorder
    apply_type = _RecordedApply

    def _begin(self, model: keras.Model) -> None:
        """Attach recorders, and have the training function call them.

        It does already if they are among those that it was traced with, or if it was never called,
        as its first call traces it. Else it is made anew.
        """
        model.make_train_function()
        self._spare = {
            recorder.optimizer(): recorder
            for recorder in _recorders_known_to(model.train_function)
            if recorder.plan == self._plan and not _is_attached(recorder)
        }
        super()._begin(model)
        spare = self._spare.values()
        is_known = self.recorders and all(recorder in spare for recorder in self.recorders)
        if not is_known and not _is_new(model.train_function):
            model.make_train_function(force=True)
            model.train_function = _TrainFunction(model)

    def _recorder_of(self, optimizer: Any) -> Recorder:
        """Return a recorder for an optimizer, if possible one that the training function calls."""
        return self._spare.get(optimizer) or super()._recorder_of(optimizer)
