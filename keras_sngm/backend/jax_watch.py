"""Has the optimizer of a model recorded while it is trained, Keras' own as well as SNGM.

While a recorder is attached to an optimizer, its variables are among those of the
optimizer, for nothing else goes in and out of a training step, but not in its files.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras
from keras import ops

from keras_sngm.backend import jax_norm as norm
from keras_sngm.backend import watch
from keras_sngm.backend.jax import BackendOptimizer, dense, unscaled
from keras_sngm.backend.jax_recorder import Change, Recorder
from keras_sngm.backend.jax_state import do_if, wide
from keras_sngm.backend.recorder import Measured, attached, conditions_of_step
from keras_sngm.measurements import Plan

_SAVING = ("save_own_variables", "load_own_variables")


def attach(model: keras.Model, plan: Plan, fit: Any) -> list[Any]:
    """Record from the next training step on."""
    detach(watch.left_over(model, fit))
    recorders = watch.recorders(model, plan, Recorder)
    model.make_train_function()
    if not isinstance(model.train_function, _TrainFunction):
        model.train_function = _TrainFunction(model)
    optimizers = [model.optimizer]
    for recorder in recorders:
        recorder.root = model.optimizer
        watch.begin(recorder, _Watched, fit)
        _track(recorder)
        optimizers.append(recorder.optimizer())
    for optimizer in optimizers:
        _keep_recorders_out_of_files(optimizer)
    if hasattr(model, "_record_training_state_sharding_spec"):
        # Older Keras has noted before training begins how each part of the state is sharded.
        model._record_training_state_sharding_spec()
    return recorders


def detach(recorders: Sequence[Any]) -> None:
    """Record no longer."""
    for recorder in recorders:
        optimizer = watch.end(recorder)
        if optimizer is None:
            continue
        _untrack(recorder)
        if isinstance(optimizer, BackendOptimizer):
            optimizer.forget(recorder)
        if not attached(optimizer):
            for one in (optimizer, recorder.root):
                for name in _SAVING:
                    vars(one).pop(name, None)


def _track(recorder: Recorder) -> None:
    for variable in recorder.own:
        recorder.optimizer()._track_variable(variable)


def _untrack(recorder: Recorder) -> None:
    for variable in recorder.own:
        recorder.optimizer()._untrack_variable(variable)


def _recorders_of(optimizer: Any) -> list[Recorder]:
    return [recorder for one in watch.updating(optimizer) for recorder in attached(one)]


def _keep_recorders_out_of_files(optimizer: Any) -> None:
    for name in _SAVING:
        if name not in vars(optimizer):
            setattr(optimizer, name, functools.partial(_without_recorders, optimizer, name))


def _without_recorders(optimizer: Any, name: str, store: Any) -> None:
    with _hidden(_recorders_of(optimizer)):
        getattr(type(optimizer), name)(optimizer, store)


@contextlib.contextmanager
def _hidden(recorders: Sequence[Recorder]) -> Iterator[None]:
    for recorder in recorders:
        _untrack(recorder)
    try:
        yield
    finally:
        for recorder in recorders:
            _track(recorder)


class _TrainFunction:
    """Takes the place of a model's training function, for good.

    A function that was traced with recorders may be called with others of the same
    plans, and without any: JAX traces it once more for another state.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        self._function = model.train_function
        self._plans: tuple[Plan, ...] = ()
        self._guards = False
        self._length = len(model.optimizer.variables)

    def __call__(self, state: Any, iterator: Any) -> tuple[Any, Any]:
        model = self._model()
        recorders = _recorders_of(model.optimizer)
        plans = tuple(recorder.plan for recorder in recorders)
        if not self._fits(model, plans):
            with _in_place(model, state):
                self._make_anew(model)
        self._length = len(model.optimizer.variables)
        self._plans = plans or self._plans
        if not recorders:
            return self._function(state, iterator)
        ids = [id(variable) for variable in model.optimizer.variables]
        values = dict(zip(ids, state[2], strict=True))
        for recorder in recorders:
            recorder.before_call(values)
        state = (*state[:2], [values[i] for i in ids], *state[3:])
        logs, state = self._function(state, iterator)
        values = dict(zip(ids, state[2], strict=True))
        for recorder in recorders:
            recorder.after_call(values)
        return logs, state

    def _fits(self, model: keras.Model, plans: tuple[Plan, ...]) -> bool:
        """Whether the function may be called with recorders of these plans."""
        guards = any(plan.stops for plan in plans)
        # Under a distribution it is made for a state of one length.
        is_of_any_length = keras.distribution.distribution() is None
        has_length = len(model.optimizer.variables) == self._length
        # It was traced with the recorders of that time. Others of the same plans have the
        # same places in the state, so that it writes to theirs.
        known = not plans or not self._plans or plans == self._plans
        return (is_of_any_length or has_length) and known and self._guards >= guards

    def _make_anew(self, model: keras.Model) -> None:
        step, is_own = model.train_step, "train_step" in vars(model)
        model.train_step = functools.partial(_guarded_step, model, step)
        try:
            model.make_train_function(force=True)
        finally:
            if is_own:
                model.train_step = step
            else:
                del model.train_step
        self._function, model.train_function = model.train_function, self
        self._guards = True


@contextlib.contextmanager
def _in_place(model: keras.Model, state: Any) -> Iterator[None]:
    """Gives variables the values that Keras has taken away from them while it trains."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    taken = [
        (variable, value)
        for variables, values in zip(groups, state, strict=True)
        for variable, value in zip(variables, values, strict=True)
        if variable._value is None
    ]
    for variable, value in taken:
        variable._value = value
    try:
        yield
    finally:
        for variable, _ in taken:
            variable._value = None


def _guarded_step(
    model: keras.Model, step: Callable[..., Any], state: Any, data: Any
) -> tuple[Any, Any]:
    """A training step that backs up what is to be restored after a stop."""
    logs, new = step(state, data)
    optimizer_variables = model.optimizer.variables
    variables = [*model.non_trainable_variables, *optimizer_variables]
    before = _by_id(variables, [*state[1], *state[2]])
    after = _by_id(variables, [*new[1], *new[2]])
    for recorder in _recorders_of(model.optimizer):
        after |= recorder.backed_up(before, after)
    return logs, (*new[:2], [after[id(v)] for v in optimizer_variables], *new[3:])


def _by_id(variables: Sequence[keras.Variable], values: Sequence[jax.Array]) -> dict[int, Any]:
    return {id(variable): value for variable, value in zip(variables, values, strict=True)}


class _Watched(watch.Watched):
    def _update(self, given: watch.Given, gradients: list[Any], variables: list[Any]) -> None:
        optimizer = self._optimizer
        weights = optimizer._trainable_variables
        known, positions = given.gradients, given.positions
        final = [self._final(*pair) for pair in zip(known, positions, strict=True)]
        squares, prescale = norm.squares_and_prescale(final, blockwise=False)
        measured, directions = watch.measured(squares, prescale, final, positions, len(weights))
        step = ops.convert_to_tensor(optimizer.iterations) + 1
        recorders = attached(optimizer)
        times = [self._when(recorder, measured) for recorder in recorders]
        before = [variable.value for variable in weights]
        self._apply_unless_stopped(recorders, measured, gradients, variables)
        change = Change(before, [variable.value for variable in weights], [])
        for recorder, when in zip(recorders, times, strict=True):
            record = functools.partial(recorder.record, step, measured, change, directions)
            if when is None:
                record()
            else:
                do_if(when, record, recorder.own)

    def _final(self, gradient: Any, position: int) -> jax.Array:
        """The gradient that the next update is made with."""
        optimizer = self._optimizer
        gradient = wide(unscaled(dense(gradient), optimizer.loss_scale_factor))
        if not optimizer.gradient_accumulation_steps:
            return gradient
        before = wide(optimizer._accumulated_gradients[position].value)
        return (before + gradient) / optimizer.gradient_accumulation_steps

    def _when(self, recorder: Recorder, measured: Measured) -> jax.Array | None:
        """Whether there is something to record, `None` for always."""
        times = self._optimizer.gradient_accumulation_steps
        if times is None:
            return None
        is_update = (self._optimizer._iterations.value + 1) % times == 0
        if recorder.plan.stops:
            is_update |= ~ops.isfinite(measured.norm)
        return is_update

    def _apply_unless_stopped(
        self,
        recorders: Sequence[Recorder],
        measured: Measured,
        gradients: list[Any],
        variables: list[keras.Variable],
    ) -> None:
        conditions = conditions_of_step(recorders)
        if not conditions:
            self._apply(gradients, variables)
            return
        optimizer = self._optimizer
        may = functools.reduce(ops.logical_and, [*conditions, ops.isfinite(measured.norm)])
        do_if(
            may,
            lambda: self._apply(gradients, variables),
            [*optimizer._trainable_variables, *optimizer.variables],
        )
