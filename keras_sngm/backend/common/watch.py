"""Attaching of recorders to the optimizers of a model.

SNGM calls its recorders itself. The `apply` of any other optimizer is wrapped while a
recorder is attached to it. Nothing is built here that Keras would not build at once.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_sngm.backend.common.optimizer import WholeModelOptimizer
from keras_sngm.backend.common.recorder import attached_recorders
from keras_sngm.measurements import Plan


class Attachment:
    """Attachment of one logger's recorders to the optimizers of a model, for one `fit`.

    They record from the next training step on. Recorders that another `fit` has left attached
    are detached first. For a `MultiOptimizer` that is not built recorders are attached when it is.
    A backend supplies `recorder_type` and `apply_type`.

    Args:
        model: a compiled model, built or not. Its weights that are not trainable are restored
            after a gradient that stops training.
        plan: what to record.
        fit_params: the `callback.params` of this `fit()` call, an object that no other has.

    Attributes:
        recorder_type: class of recorders, which are made for an optimizer.
        apply_type: class of what replaces the `apply` of optimizers other than SNGM, which do
            not call their recorders themselves.
        recorders: one for each optimizer that updates variables. More are added when a
            `MultiOptimizer` is built.
        root: the model's optimizer, which may wrap those that are recorded.
        fit_params: as given.

    Raises:
        ValueError: if the optimizers do not accumulate over the same number of steps.
    """

    recorder_type: Callable[..., Any]
    apply_type: Callable[[Any], Callable[..., None]]

    def __init__(self, model: keras.Model, plan: Plan, fit_params: Any) -> None:
        for recorder in recorders_of(model.optimizer):
            if recorder.fit_params is not fit_params:
                _detach(recorder)
        self.recorders: list[Any] = []
        self.root = model.optimizer
        self.fit_params = fit_params
        self._plan = plan
        self._model: Callable[[], Any] = weakref.ref(model)
        self._begin(model)

    def detach(self) -> None:
        """Detach all recorders, and call off what waits for a `MultiOptimizer` to be built."""
        container = _container(self.root)
        if container is not None:
            vars(container).pop("build", None)
        for recorder in self.recorders:
            _detach(recorder)

    def is_current(self, model: keras.Model) -> bool:
        """Return whether the model's next training step is recorded: it was not compiled anew."""
        return self.root is model.optimizer

    def _begin(self, model: keras.Model) -> None:
        """Attach recorders to the optimizers, now or when a `MultiOptimizer` is built.

        Args:
            model: the model, for backends that attach something to it, too.
        """
        container = _unbuilt_container(self.root)
        if container is None:
            self._attach()
        else:
            if "build" not in vars(container):
                container.build = _Build(container)
            container.build.wait(self.fit_params, self._attach)

    def _attach(self) -> None:
        """Attach a recorder to each optimizer that updates variables, unless there are recorders.

        Other optimizers than SNGM get an `apply` that records.
        """
        for optimizer in () if self.recorders else updating_optimizers(self.root):
            recorder = self._recorder_of(optimizer)
            recorder.fit_params = self.fit_params
            attached_recorders(optimizer).append(recorder)
            if not isinstance(optimizer, WholeModelOptimizer) and "apply" not in vars(optimizer):
                optimizer.apply = self.apply_type(optimizer)
            self.recorders.append(recorder)
            recorder.open()

    def _recorder_of(self, optimizer: Any) -> Any:
        """Make a recorder for an optimizer, which also restores the model's other weights.

        After a gradient that is not finite, if the plan stops at it, these are restored: the
        weights that are not trained, such as batch statistics.
        """
        model = self._model
        return self.recorder_type(optimizer, self._plan, lambda: model().non_trainable_weights)


def _detach(recorder: Any) -> None:
    """Detach one recorder from its optimizer, unless that is done.

    The last one gives the optimizer its own `apply` back. SNGM drops the compiled steps that
    record to it.
    """
    optimizer = recorder.optimizer()
    if optimizer is None or recorder not in attached_recorders(optimizer):
        return
    attached_recorders(optimizer).remove(recorder)
    if not attached_recorders(optimizer):
        vars(optimizer).pop("apply", None)
    if isinstance(optimizer, WholeModelOptimizer):
        optimizer.drop_steps_with(recorder)


def recorders_of(optimizer: Any) -> list[Any]:
    """Return the recorders attached to an optimizer or to those inside of it."""
    return [
        recorder for one in _inner_optimizers(optimizer) for recorder in attached_recorders(one)
    ]


def updating_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that update variables, without those that wrap them.

    Args:
        optimizer: a model's optimizer, which may be a `MultiOptimizer` or a `LossScaleOptimizer`.

    Raises:
        ValueError: if they do not accumulate over the same number of steps.
    """
    optimizers = _inner_optimizers(optimizer)
    micro_batches = [one.gradient_accumulation_steps for one in optimizers]
    if len(set(micro_batches)) > 1:
        raise ValueError(
            "The optimizers of a `MultiOptimizer` can be logged together if they have the same "
            f"`gradient_accumulation_steps`. Received: {micro_batches}"
        )
    return optimizers


def _inner_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that update variables: the built ones in a `MultiOptimizer`, or one.

    That one is the optimizer itself, or the one inside of it if it is a `LossScaleOptimizer`.
    """
    container = _container(optimizer)
    if container is not None:
        return [one for one in container.optimizers if one.built]
    return [_unwrapped(optimizer)]


def _container(optimizer: Any) -> Any:
    """Return the `MultiOptimizer` that an optimizer is or wraps, or `None`."""
    optimizer = _unwrapped(optimizer)
    return optimizer if hasattr(optimizer, "optimizers") else None


def _unbuilt_container(optimizer: Any) -> Any:
    """Return the `MultiOptimizer` that an optimizer is or wraps if it is not built, or `None`."""
    container = _container(optimizer)
    return None if container is None or container.built else container


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside of any number of `LossScaleOptimizer`s."""
    while getattr(optimizer, "inner_optimizer", None) is not None:
        optimizer = optimizer.inner_optimizer
    return optimizer


class _Build:
    """Replacement of the `build` of a `MultiOptimizer`, which decides what it consists of."""

    def __init__(self, optimizer: Any) -> None:
        self._build = optimizer.build
        self._waiting: list[tuple[Any, Callable[[], None]]] = []

    def wait(self, fit_params: Any, attach: Callable[[], None]) -> None:
        """Have `attach` called once the optimizer is built.

        Forgets what any other `fit` waits for.

        Args:
            fit_params: the `callback.params` of this `fit()` call.
            attach: attaches recorders to the optimizers inside.
        """
        self._waiting = [one for one in self._waiting if one[0] is fit_params]
        self._waiting.append((fit_params, attach))

    def __call__(self, variables: Sequence[Any]) -> None:
        """Build the `MultiOptimizer`, then attach the recorders that wait for it."""
        self._build(variables)
        for _, attach in self._waiting:
            attach()
