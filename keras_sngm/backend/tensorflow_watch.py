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

from keras_sngm.backend import tensorflow_norm as norm
from keras_sngm.backend import watch
from keras_sngm.backend.recorder import Measured, attached, conditions_of_step
from keras_sngm.backend.tensorflow_recorder import Recorder
from keras_sngm.backend.tensorflow_replicas import OwnReplica
from keras_sngm.backend.tensorflow_slot import arithmetic_dtype, dense, is_accelerator, widest
from keras_sngm.measurements import Plan

# The recorders that a training function was made with. It goes on calling them.
_traced: weakref.WeakKeyDictionary[Any, list[Recorder]] = weakref.WeakKeyDictionary()


def attach(model: keras.Model, plan: Plan, fit: Any) -> list[Any]:
    """Record from the next training step on.

    The training function is made anew, and traced again by its next call, unless it
    already holds such recorders from an earlier `fit`.
    """
    detach(watch.left_over(model, fit))
    model.make_train_function()
    optimizers = watch.updating(model.optimizer)
    recorders = _left_by_an_earlier_fit(model, optimizers, plan)
    if not recorders:
        recorders = watch.recorders(model, plan, Recorder)
        model.make_train_function(force=True)
    for recorder in recorders:
        watch.begin(recorder, _Watched, fit)
        recorder.left_at = None
    _traced.setdefault(
        model.train_function,
        [recorder for optimizer in optimizers for recorder in attached(optimizer)],
    )
    return recorders


def detach(recorders: Sequence[Any]) -> None:
    """Record no longer."""
    for recorder in recorders:
        optimizer = watch.end(recorder)
        if optimizer is not None:
            recorder.left_at = _calls(optimizer)


def _left_by_an_earlier_fit(
    model: keras.Model, optimizers: Sequence[Any], plan: Plan
) -> list[Recorder]:
    known = _traced.get(model.train_function, [])
    found = [
        [
            recorder
            for recorder in known
            if recorder.optimizer() is optimizer
            and recorder.plan == plan
            # What was trained without it may have been traced without it.
            and recorder.left_at == _calls(optimizer)
        ]
        for optimizer in optimizers
    ]
    return [fitting[0] for fitting in found] if all(found) else []


def _calls(optimizer: Any) -> int:
    """How often the optimizer was called. Waits for the device."""
    return int(keras.ops.convert_to_numpy(optimizer._iterations))


class _Watched(watch.Watched):
    """Sums up the gradients of all replicas once more, in each training step.

    Where Keras does it, nobody else can see the result.
    """

    def _update(self, given: watch.Given, gradients: list[Any], variables: list[Any]) -> None:
        optimizer = self._optimizer
        known, on, positions = given
        replicas = OwnReplica(tf.distribute.get_replica_context())

        def local(value: Any) -> Any:
            return replicas.parts(value)[0]

        final = [self._final(g, v, local) for g, v in zip(known, on, strict=True)]
        summed = [
            dense(gradient, variable.shape)
            for gradient, variable in zip(replicas.sums(final), on, strict=True)
        ]
        squares, prescale = _squares_and_prescale(summed, local(on[0]).device)
        measured, directions = watch.measured(
            squares, prescale, summed, positions, len(optimizer._trainable_variables)
        )
        step = tf.cast(optimizer.iterations, tf.int64) + 1
        recorders = attached(optimizer)
        times = [self._when(recorder, measured) for recorder in recorders]
        for recorder, when in zip(recorders, times, strict=True):
            _if(when, functools.partial(recorder.before, local, step))
        self._apply_unless_stopped(recorders, local, measured, gradients, variables)
        for recorder, when in zip(recorders, times, strict=True):
            _if(
                when,
                functools.partial(recorder.after, local, step, measured, lambda _: directions()),
            )

    def _final(self, gradient: Any, variable: Any, local: Callable[[Any], Any]) -> Any:
        """This replica's part of the gradient that the next update is made with."""
        optimizer = self._optimizer
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

    def _when(self, recorder: Recorder, measured: Measured) -> tf.Tensor | None:
        """Whether there is something to record, `None` for always."""
        times = self._optimizer.gradient_accumulation_steps
        if times is None:
            return None
        is_update = (self._optimizer._iterations + 1) % times == 0
        if recorder.plan.stops:
            is_update |= tf.logical_not(tf.math.is_finite(measured.norm))
        return is_update

    def _apply_unless_stopped(
        self,
        recorders: Sequence[Recorder],
        local: Callable[[Any], Any],
        measured: Measured,
        gradients: list[Any],
        variables: list[Any],
    ) -> None:
        conditions = conditions_of_step(recorders, local)
        if not conditions:
            self._apply(gradients, variables)
            return
        may = tf.reduce_all([*conditions, tf.math.is_finite(measured.norm)])
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


def _squares_and_prescale(
    gradients: Sequence[tf.Tensor], device: str
) -> tuple[tf.Tensor, tf.Tensor]:
    usual, rare = norm.sums_on(
        is_accelerator(device), GraphOrParentsInXlaContext(get_default_graph())
    )
    wide = [tf.cast(gradient, widest(gradients)) for gradient in gradients]
    size = sum(gradient.shape.num_elements() for gradient in gradients)
    return norm.squares_and_prescale(usual, rare, wide, size)


def _if(condition: tf.Tensor | None, action: Callable[[], Any]) -> None:
    """`None` stands for always."""

    def act() -> None:
        action()

    if condition is None:
        act()
    else:
        tf.cond(condition, act, lambda: None)
