"""Has the optimizer of a model recorded while it is trained, Keras' own as well as SNGM.

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

from keras_sngm.backend.common import watch
from keras_sngm.backend.common.recorder import Measured, attached, conditions_of_step, ready
from keras_sngm.backend.tensorflow import norm
from keras_sngm.backend.tensorflow.recorder import Recorder
from keras_sngm.backend.tensorflow.replicas import OwnReplica
from keras_sngm.backend.tensorflow.slot import (
    arithmetic_dtype,
    dense,
    is_accelerator,
    of_known_shape,
    widest,
)
from keras_sngm.measurements import Plan
from keras_sngm.normalization import Normalization


def attach(model: keras.Model, plan: Plan, fit_params: Any) -> watch.Watch:
    """Record from the next training step on.

    The training function is made anew, and traced by its next call, unless it already
    calls such recorders from an earlier `fit`.
    """
    for recorder in watch.left_over(model, fit_params):
        watch.detach(recorder)
    model.make_train_function()
    own = watch.Watch(model, fit_params)
    known = _recorders_known_to(model.train_function)
    spare = [recorder for recorder in known if recorder.plan == plan and not _is_attached(recorder)]
    make = watch.maker(model, plan, Recorder)
    used = {recorder.optimizer(): recorder for recorder in spare}
    own.begin(lambda optimizer: used.get(optimizer) or make(optimizer), _Watched)
    is_known = own.recorders and all(recorder in spare for recorder in own.recorders)
    if not is_known and not _is_new(model.train_function):
        model.make_train_function(force=True)
        model.train_function = _TrainFunction(model)
    return own


def detach(own: watch.Watch) -> None:
    """Record no longer."""
    own.end()


def is_current(own: watch.Watch, model: keras.Model) -> bool:
    """Return whether the next training step of the model is still recorded."""
    return own.root is model.optimizer


class _TrainFunction:
    """Takes the place of a model's training function, for good.

    Attributes:
        recorders: those that each call so far was made with: every graph that was traced
            calls them. `None` before the first call.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        self._function = model.train_function
        self.recorders: list[Recorder] | None = None

    def __call__(self, iterator: Any) -> Any:
        try:
            return self._function(iterator)
        finally:
            now = watch.recorders_of(self._model().optimizer)
            self.recorders = [r for r in now if self.recorders is None or r in self.recorders]


def _is_new(train_function: Any) -> bool:
    """Return whether a training function calls whatever is attached before its first call."""
    return isinstance(train_function, _TrainFunction) and train_function.recorders is None


def _recorders_known_to(train_function: Any) -> list[Recorder]:
    return getattr(train_function, "recorders", None) or []


def _is_attached(recorder: Recorder) -> bool:
    return recorder in attached(recorder.optimizer())


class _Watched(watch.Watched):
    """Sums up the gradients of all replicas once more, in each training step.

    Where Keras does it, nobody else can see the result.
    """

    def _update(
        self, given: watch.Given, gradients: list[Any], variables: list[Any] | None
    ) -> None:
        optimizer = self._optimizer
        known, on, indices = given
        replicas = OwnReplica(tf.distribute.get_replica_context())

        def local(value: Any) -> Any:
            return replicas.parts(value)[0]

        final = [self._final(g, v, local) for g, v in zip(known, on, strict=True)]
        summed = [
            dense(gradient, variable.shape)
            for gradient, variable in zip(replicas.sums(final), on, strict=True)
        ]
        normalized = _normalized(summed, local(on[0]).device)
        measured, directions = watch.measured(
            normalized, summed, indices, len(optimizer._trainable_variables)
        )
        step = tf.cast(optimizer.iterations, tf.int64) + 1
        recorders = ready(optimizer)
        are_due = [self._is_due(recorder, measured) for recorder in recorders]
        for recorder, is_due in zip(recorders, are_due, strict=True):
            _if(is_due, functools.partial(recorder.before, local, step))
        self._apply_unless_stopped(recorders, local, measured, gradients, variables)
        for recorder, is_due in zip(recorders, are_due, strict=True):
            _if(
                is_due,
                functools.partial(recorder.after, local, step, measured, lambda _: directions()),
            )

    def _final(self, gradient: Any, variable: Any, local: Callable[[Any], Any]) -> Any:
        """This replica's part of the gradient that the next update is made with."""
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
            before = tf.cast(local(optimizer._accumulated_gradients[index]), dtype)
            gradient = (before + gradient) / optimizer.gradient_accumulation_steps
        return gradient

    def _is_due(self, recorder: Recorder, measured: Measured) -> tf.Tensor | None:
        """Whether there is something to record, `None` for always."""
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
        local: Callable[[Any], Any],
        measured: Measured,
        gradients: list[Any],
        variables: list[Any] | None,
    ) -> None:
        conditions = conditions_of_step(recorders, local)
        if not conditions:
            self._apply(gradients, variables)
            return
        may = tf.reduce_all([*conditions, measured.is_finite])
        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            _if(may, lambda: self._apply(gradients, variables))
            return

        def on_all_replicas(strategy: Any, may: Any, gradients: Any) -> None:
            _if(
                strategy.experimental_local_results(may)[0],
                lambda: strategy.extended.call_for_each_replica(
                    lambda own: self._apply(own, variables), args=(gradients,)
                ),
            )

        # Replicas may communicate in a condition only where all of them are left.
        tf.distribute.get_replica_context().merge_call(
            tf.autograph.experimental.do_not_convert(on_all_replicas), args=(may, gradients)
        )


def _normalized(gradients: Sequence[tf.Tensor], device: str) -> Normalization:
    usual, rare = norm.sums_on(
        is_accelerator(device), GraphOrParentsInXlaContext(get_default_graph())
    )
    at_least_float32 = [tf.cast(gradient, widest(gradients)) for gradient in gradients]
    sizes = [gradient.shape.num_elements() for gradient in gradients]
    return norm.normalized_by(usual, rare, watch.PLAIN_RULE, at_least_float32, sizes)


def _if(condition: tf.Tensor | None, action: Callable[[], Any]) -> None:
    """`None` stands for always."""

    def act() -> None:
        action()

    if condition is None:
        act()
    else:
        tf.cond(condition, act, lambda: None)
