"""Has the optimizer of a model recorded while it is trained, Keras' own as well as SNGM.

Nothing goes in and out of a training step but the state of the model. So the training
function gets the variables of the recorders behind those of the optimizer, and within it
they are the optimizer's. Outside of it nobody sees them.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras
from keras import ops

from keras_sngm.backend.common import watch
from keras_sngm.backend.common.recorder import Measured, conditions_of_step, ready
from keras_sngm.backend.jax.norm import normalized_by
from keras_sngm.backend.jax.optimizer import BackendOptimizer, dense, unscaled
from keras_sngm.backend.jax.recorder import Change, Recorder
from keras_sngm.backend.jax.state import at_least_float32, do_if
from keras_sngm.measurements import Plan


def attach(model: keras.Model, plan: Plan, fit_params: Any) -> watch.Watch:
    """Record from the next training step on."""
    for recorder in watch.left_over(model, fit_params):
        _detach(recorder)
    own = watch.Watch(model, fit_params)
    own.begin(watch.maker(model, plan, Recorder), _Watched)
    model.make_train_function()
    if not isinstance(model.train_function, _TrainFunction):
        model.train_function = _TrainFunction(model)
    return own


def detach(own: watch.Watch) -> None:
    """Record no longer."""
    for recorder in own.recorders:
        _detach(recorder)
    own.end()


def _detach(recorder: Recorder) -> None:
    optimizer = recorder.optimizer()
    if watch.detach(recorder) and isinstance(optimizer, BackendOptimizer):
        optimizer.forget(recorder)


def is_current(own: watch.Watch, model: keras.Model) -> bool:
    """Return whether the next training step of the model is still recorded."""
    return own.root is model.optimizer and isinstance(model.train_function, _TrainFunction)


def _recorders_of(model: keras.Model) -> list[Recorder]:
    return [recorder for recorder in watch.recorders_of(model.optimizer) if recorder.is_open]


class _TrainFunction:
    """Takes the place of a model's training function, for good.

    Without recorders it calls the function that Keras has made. With them it calls another,
    which may be traced with some recorders and called with others of the same plans.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        self._plain = model.train_function
        self._recording: Any = None
        self._made_for: Any = None
        self._order: list[int] = []

    def __call__(self, state: Any, iterator: Any) -> tuple[Any, Any]:
        model = self._model()
        recorders = _recorders_of(model)
        if not recorders:
            return self._plain(state, iterator)
        function = self._recording_function(model, recorders, state)
        added = [value for recorder in recorders for value in recorder.take()]
        given = [*state[2], *added]
        values = [given[i] for i in self._order]
        logs, state = function((*state[:2], values, *state[3:]), iterator)
        result = dict(zip(self._order, state[2], strict=True))
        first = len(given) - len(added)
        for recorder in recorders:
            last = first + len(recorder.own)
            recorder.put([result[i] for i in range(first, last)])
            first = last
        own = [result[i] for i in range(len(given) - len(added))]
        return logs, (*state[:2], own, *state[3:])

    def _recording_function(
        self, model: keras.Model, recorders: Sequence[Recorder], state: Any
    ) -> Callable[..., Any]:
        made_for = (len(state[2]), [recorder.plan for recorder in recorders])
        if self._recording is None or self._made_for != made_for:
            with _in_place(model, state):
                self._make(model, recorders)
            self._made_for = made_for
        return self._recording

    def _make(self, model: keras.Model, recorders: Sequence[Recorder]) -> None:
        own = [variable for recorder in recorders for variable in recorder.own]
        places = {id(v): i for i, v in enumerate([*model.optimizer.variables, *own])}
        step, is_own = model.train_step, "train_step" in vars(model)
        with _tracked(recorders):
            shardings = [variable.value.sharding for variable in model.optimizer.variables]
        model.train_step = functools.partial(_recorded_step, model, step, shardings)
        try:
            with _tracked(recorders):
                self._order = [places[id(v)] for v in model.optimizer.variables]
                model.make_train_function(force=True)
        finally:
            if is_own:
                model.train_step = step
            else:
                del model.train_step
        self._recording, model.train_function = model.train_function, self


@contextlib.contextmanager
def _tracked(recorders: Sequence[Recorder]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for recorder in recorders:
            stack.enter_context(recorder.tracked())
        yield


@contextlib.contextmanager
def _in_place(model: keras.Model, state: Any) -> Iterator[None]:
    """Gives variables the values that Keras has taken away from them while it trains."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    is_taken = [
        (variable, value)
        for variables, values in zip(groups, state, strict=True)
        for variable, value in zip(variables, values, strict=True)
        if variable._value is None
    ]
    for variable, value in is_taken:
        variable._value = value
    try:
        yield
    finally:
        for variable, _ in is_taken:
            variable._value = None


@contextlib.contextmanager
def _sharded_as(model: keras.Model, shardings: Sequence[Any]) -> Iterator[None]:
    """Replace what older Keras has noted before training: how the optimizer's state is sharded."""
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
    """A training step that records, and backs up what is to be restored after a stop."""
    recorders = _recorders_of(model)
    with _tracked(recorders), _sharded_as(model, shardings):
        logs, new = step(state, data)
        optimizer_variables = model.optimizer.variables
    variables = [*model.non_trainable_variables, *optimizer_variables]
    before = _by_id(variables, [*state[1], *state[2]])
    after = _by_id(variables, [*new[1], *new[2]])
    for recorder in recorders:
        after |= recorder.backed_up(before, after)
    return logs, (*new[:2], [after[id(v)] for v in optimizer_variables], *new[3:])


def _by_id(variables: Sequence[keras.Variable], values: Sequence[jax.Array]) -> dict[int, Any]:
    return {id(variable): value for variable, value in zip(variables, values, strict=True)}


class _Watched(watch.Watched):
    def _update(
        self, given: watch.Given, gradients: list[Any], variables: list[Any] | None
    ) -> None:
        optimizer = self._optimizer
        weights = optimizer._trainable_variables
        known, indices = given.gradients, given.indices
        final = [self._final(*pair) for pair in zip(known, indices, strict=True)]
        normalized = normalized_by(watch.PLAIN_RULE, final)
        measured, directions = watch.measured(normalized, final, indices, len(weights))
        step = ops.convert_to_tensor(optimizer.iterations) + 1
        recorders = ready(optimizer)
        are_due = [self._is_due(recorder, measured) for recorder in recorders]
        before = [variable.value for variable in weights]
        self._apply_unless_stopped(recorders, measured, gradients, variables)
        change = Change(before, [variable.value for variable in weights], [])
        for recorder, is_due in zip(recorders, are_due, strict=True):
            record = functools.partial(recorder.record, step, measured, change, directions)
            if is_due is None:
                record()
            else:
                do_if(is_due, record, recorder.own)

    def _final(self, gradient: Any, index: int) -> jax.Array:
        """The gradient that the next update is made with."""
        optimizer = self._optimizer
        gradient = at_least_float32(unscaled(dense(gradient), optimizer.loss_scale_factor))
        if not optimizer.gradient_accumulation_steps:
            return gradient
        before = at_least_float32(optimizer._accumulated_gradients[index].value)
        return (before + gradient) / optimizer.gradient_accumulation_steps

    def _is_due(self, recorder: Recorder, measured: Measured) -> jax.Array | None:
        """Return whether there is something to record, `None` for always."""
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
        conditions = conditions_of_step(recorders)
        if not conditions:
            self._apply(gradients, variables)
            return
        optimizer = self._optimizer
        may = functools.reduce(ops.logical_and, [*conditions, measured.is_finite])
        do_if(
            may,
            lambda: self._apply(gradients, variables),
            [*optimizer._trainable_variables, *optimizer.variables],
        )
