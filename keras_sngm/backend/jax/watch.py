"""Attaching of recorders to the optimizers of a model on JAX.

Nothing goes in and out of a training step but the state of the model. So the training
function gets the variables of the recorders behind those of the optimizer, and within it
they are the optimizer's. Outside of it nobody sees them.

The training functions that record, and what they replace, are in one file.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras
from keras import ops

from keras_sngm.backend.common import recorded_apply, watch
from keras_sngm.backend.common.measured import Measured
from keras_sngm.backend.common.recorder import conditions_of_step, ready_recorders
from keras_sngm.backend.jax.gradients import dense, unscaled
from keras_sngm.backend.jax.norm import normalized_by
from keras_sngm.backend.jax.recorder import Change, Recorder
from keras_sngm.backend.jax.state import at_least_float32, do_if


def _recorders_of(model: keras.Model) -> list[Recorder]:
    """Return the recorders of a model's optimizers that have their variables."""
    return [recorder for recorder in watch.recorders_of(model.optimizer) if recorder.is_open]


class _TrainFunction:
    """Permanent replacement of a model's training function, which records if there are recorders.

    Without recorders it calls the function that Keras has made. With them it calls another,
    which may be traced with some recorders and called with others of the same plans. That one
    takes the recorders' variables among those of the optimizer: `_order` has, for each variable as
    it takes them, the index among the optimizer's variables followed by the recorders'.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        self._plain = model.train_function
        self._recording: Any = None
        self._recording_key: Any = None
        self._order: list[int] = []

    def __call__(self, state: Any, iterator: Any) -> tuple[Any, Any]:
        """Train on the next data, as Keras' training function does, and record.

        Args:
            state: the values of the model's trainable and other variables, of the optimizer's
                variables and of the metrics' variables.
            iterator: iterator over the training data.

        Returns:
            The logs and the new state.
        """
        model = self._model()
        recorders = _recorders_of(model)
        if not recorders:
            return self._plain(state, iterator)
        function = self._recording_function(model, recorders, state)
        added = [value for recorder in recorders for value in recorder.values_for_step()]
        in_both = [*state[2], *added]
        values = [in_both[i] for i in self._order]
        logs, state = function((*state[:2], values, *state[3:]), iterator)
        result = dict(zip(self._order, state[2], strict=True))
        first = len(in_both) - len(added)
        for recorder in recorders:
            last = first + len(recorder.state_variables)
            recorder.set_values([result[i] for i in range(first, last)])
            first = last
        of_optimizer = [result[i] for i in range(len(in_both) - len(added))]
        return logs, (*state[:2], of_optimizer, *state[3:])

    def _recording_function(
        self, model: keras.Model, recorders: Sequence[Recorder], state: Any
    ) -> Callable[..., Any]:
        """Return the training function that records, made anew if state or plans are others.

        Args:
            model: the model in training.
            recorders: the recorders of its optimizers, each with a plan of what to record.
            state: the values of the model's trainable and other variables, of the optimizer's
                variables and of the metrics' variables.
        """
        made_for = (len(state[2]), [recorder.plan for recorder in recorders])
        if self._recording is None or self._recording_key != made_for:
            with _with_values(model, state):
                self._make_recording_function(model, recorders)
            self._recording_key = made_for
        return self._recording

    def _make_recording_function(self, model: keras.Model, recorders: Sequence[Recorder]) -> None:
        """Make the training function that records, by Keras' own `make_train_function`.

        While Keras makes it the recorders' variables are among the optimizer's. `_order` notes, for
        each of these, its index among the optimizer's own followed by the recorders'.
        """
        added = [variable for recorder in recorders for variable in recorder.state_variables]
        places = {id(v): i for i, v in enumerate([*model.optimizer.variables, *added])}
        step, is_instance_attribute = model.train_step, "train_step" in vars(model)
        with _tracked(recorders):
            shardings = [variable.value.sharding for variable in model.optimizer.variables]
        model.train_step = functools.partial(_recorded_step, model, step, shardings)
        try:
            with _tracked(recorders):
                self._order = [places[id(v)] for v in model.optimizer.variables]
                model.make_train_function(force=True)
        finally:
            if is_instance_attribute:
                model.train_step = step
            else:
                del model.train_step
        self._recording, model.train_function = model.train_function, self


@contextlib.contextmanager
def _tracked(recorders: Sequence[Recorder]) -> Iterator[None]:
    """Return a context in which all recorders' variables are among their optimizer's."""
    with contextlib.ExitStack() as stack:
        for recorder in recorders:
            stack.enter_context(recorder.tracked())
        yield


@contextlib.contextmanager
def _with_values(model: keras.Model, state: Any) -> Iterator[None]:
    """Return a context in which variables have values that Keras takes away while it trains."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    taken_away = [
        (variable, value)
        for variables, values in zip(groups, state, strict=True)
        for variable, value in zip(variables, values, strict=True)
        if variable._value is None
    ]
    for variable, value in taken_away:
        variable._value = value
    try:
        yield
    finally:
        for variable, _ in taken_away:
            variable._value = None


@contextlib.contextmanager
def _sharded_as(model: keras.Model, shardings: Sequence[Any]) -> Iterator[None]:
    """Return a context in which Keras takes these for the shardings of the optimizer's state.

    Older versions of Keras note them when training begins, without the recorders' variables.
    """
    noted = getattr(model, "_optimizer_variable_shardings", None)
    if noted is None:
        yield
        return
    model._optimizer_variable_shardings = shardings
    try:
        yield
    finally:
        model._optimizer_variable_shardings = noted


def _recorded_step(
    model: keras.Model, step: Callable[..., Any], shardings: Sequence[Any], state: Any, data: Any
) -> tuple[Any, Any]:
    """Take a training step that records, and back up the variables to be restored after a halt.

    Args:
        model: the model in training.
        step: its `train_step`.
        shardings: the shardings of the optimizer's and the recorders' variables.
        state: as for `train_step`; the recorders' variables are among the optimizer's.
        data: as for `train_step`.

    Returns:
        As `train_step`: the logs and the new state, with the new backups in it.
    """
    recorders = _recorders_of(model)
    with _tracked(recorders), _sharded_as(model, shardings):
        logs, new = step(state, data)
        optimizer_variables = model.optimizer.variables
    variables = [*model.non_trainable_variables, *optimizer_variables]
    before = _values_by_id(variables, [*state[1], *state[2]])
    after = _values_by_id(variables, [*new[1], *new[2]])
    for recorder in recorders:
        after |= recorder.backed_up(before, after)
    return logs, (*new[:2], [after[id(v)] for v in optimizer_variables], *new[3:])


def _values_by_id(
    variables: Sequence[keras.Variable], values: Sequence[jax.Array]
) -> dict[int, Any]:
    """Return a dictionary from the id of each variable to its value."""
    return {id(variable): value for variable, value in zip(variables, values, strict=True)}


class _RecordedApply(recorded_apply.RecordedApply):
    """Replacement of an optimizer's `apply` that records, on JAX.

    Momenta of other optimizers than SNGM are not recorded.
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
        weights = optimizer._trainable_variables
        indices = inputs.indices
        final = [
            self._gradient_of_update(*pair) for pair in zip(inputs.gradients, indices, strict=True)
        ]
        normalized = normalized_by(recorded_apply.PLAIN_RULE, final)
        measured, directions = recorded_apply.measure(normalized, final, indices, len(weights))
        step = ops.convert_to_tensor(optimizer.iterations) + 1
        recorders = ready_recorders(optimizer)
        are_due = [self._is_due(recorder, measured) for recorder in recorders]
        before = [variable.value for variable in weights]
        self._apply_unless_stopped(recorders, measured, gradients, variables)
        change = Change(before, [variable.value for variable in weights], [])
        for recorder, is_due in zip(recorders, are_due, strict=True):
            record = functools.partial(recorder.record, step, measured, change, directions)
            if is_due is None:
                record()
            else:
                do_if(is_due, record, recorder.state_variables)

    def _gradient_of_update(self, gradient: Any, index: int) -> jax.Array:
        """Return the gradient of the next update: unscaled, averaged over micro-batches.

        The average takes this call for the last micro-batch of the update.

        Args:
            gradient: the gradient of one variable in this call.
            index: the index of the variable among the optimizer's.
        """
        optimizer = self._optimizer
        gradient = at_least_float32(unscaled(dense(gradient), optimizer.loss_scale_factor))
        if not optimizer.gradient_accumulation_steps:
            return gradient
        before = at_least_float32(optimizer._accumulated_gradients[index].value)
        return (before + gradient) / optimizer.gradient_accumulation_steps

    def _is_due(self, recorder: Recorder, measured: Measured) -> jax.Array | None:
        """Return a boolean scalar, whether this call ends an update; `None` if every call does.

        For a recorder that stops training, a gradient that is not finite counts as the end, too.
        """
        micro_batches = self._optimizer.gradient_accumulation_steps
        if micro_batches is None:
            return None
        is_update = (self._optimizer._iterations.value + 1) % micro_batches == 0
        if recorder.plan.stops:
            is_update |= ~measured.is_finite
        return is_update

    def _apply_unless_stopped(
        self,
        recorders: Sequence[Recorder],
        measured: Measured,
        gradients: list[Any],
        variables: list[Any] | None,
    ) -> None:
        """Apply the gradients, unless a recorder has stopped training or stops it now.

        It stops at a gradient that is not finite.

        Args:
            recorders: the recorders of this optimizer.
            measured: what was measured on the gradient of this call.
            gradients: the gradients of this call.
            variables: the variables of this call, or `None` for all of the optimizer's.
        """
        conditions = conditions_of_step(recorders)
        if not conditions:
            self._apply(gradients, variables)
            return
        optimizer = self._optimizer
        may_step = functools.reduce(ops.logical_and, [*conditions, measured.is_finite])
        do_if(
            may_step,
            lambda: self._apply(gradients, variables),
            [*optimizer._trainable_variables, *optimizer.variables],
        )


class Attachment(watch.Attachment):
    """Attachment of one logger's recorders to the optimizers of a model, on JAX.

    The model's training function is replaced by one that records.
    """

    recorder_type = Recorder
    apply_type = _RecordedApply

    def _begin(self, model: keras.Model) -> None:
        """Attach recorders, and replace the training function unless that is done."""
        super()._begin(model)
        model.make_train_function()
        if not isinstance(model.train_function, _TrainFunction):
            model.train_function = _TrainFunction(model)

    def is_current(self, model: keras.Model) -> bool:
        """Return whether the model's next training step is recorded: it was not compiled anew."""
        return super().is_current(model) and isinstance(model.train_function, _TrainFunction)
