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

Wrap = Callable[[Any], Callable[..., None]]
"""A function from an optimizer other than SNGM to the replacement of its `apply`."""


class Attachment:
    """Attachment of one logger to the optimizers of a model, for one `fit`.

    Attributes:
        recorders: one for each optimizer that updates variables. More are added when a
            `MultiOptimizer` is built.
        root: the model's optimizer, which may wrap those that are recorded.
        fit_params: the `callback.params` of this `fit()` call, an object that no other has.
    """

    def __init__(self, model: keras.Model, fit_params: Any) -> None:
        self.recorders: list[Any] = []
        self.root = model.optimizer
        self.fit_params = fit_params

    def begin(self, make: Callable[[Any], Any], wrap: Wrap) -> None:
        """Attach a recorder to each optimizer that updates variables.

        For a `MultiOptimizer` that is not built this happens when it is.

        Args:
            make: makes the recorder of an optimizer.
            wrap: makes the replacement of the `apply` of an optimizer other than SNGM.

        Raises:
            ValueError: if the optimizers do not accumulate over the same number of steps.
        """
        container = _unbuilt_container(self.root)
        if container is None:
            self._attach(updating_optimizers(self.root), make, wrap)
        else:
            if "build" not in vars(container):
                container.build = _Build(container)
            container.build.wait(self.fit_params, lambda: self._attach_inside(make, wrap))

    def _attach_inside(self, make: Callable[[Any], Any], wrap: Wrap) -> None:
        """Attach recorders to the optimizers in a `MultiOptimizer`, unless that is done.

        Args:
            make: makes the recorder of an optimizer.
            wrap: makes the replacement of the `apply` of an optimizer other than SNGM.
        """
        if not self.recorders:
            self._attach(updating_optimizers(self.root), make, wrap)

    def _attach(self, optimizers: Sequence[Any], make: Callable[[Any], Any], wrap: Wrap) -> None:
        """Attach a recorder to each optimizer; it creates its variables if the optimizer is built.

        Args:
            optimizers: the optimizers that update variables.
            make: makes the recorder of an optimizer.
            wrap: makes the replacement of the `apply` of an optimizer other than SNGM, which does
                not call its recorders itself.
        """
        for optimizer in optimizers:
            recorder = make(optimizer)
            recorder.fit_params = self.fit_params
            attached_recorders(optimizer).append(recorder)
            if not isinstance(optimizer, WholeModelOptimizer) and "apply" not in vars(optimizer):
                optimizer.apply = wrap(optimizer)
            self.recorders.append(recorder)
            recorder.open()

    def end(self) -> None:
        """Detach all recorders."""
        container = _container(self.root)
        if container is not None:
            vars(container).pop("build", None)
        for recorder in self.recorders:
            detach(recorder)


def detach(recorder: Any) -> bool:
    """Detach one recorder from its optimizer. Returns whether it was attached."""
    optimizer = recorder.optimizer()
    if optimizer is None or recorder not in attached_recorders(optimizer):
        return False
    attached_recorders(optimizer).remove(recorder)
    if not attached_recorders(optimizer):
        vars(optimizer).pop("apply", None)
    return True


def recorder_factory(
    model: keras.Model, plan: Plan, recorder: Callable[..., Any]
) -> Callable[[Any], Any]:
    """Return a function that makes the recorder of an optimizer of the model.

    Args:
        model: its weights that are not trainable are restored after a halt.
        plan: what to record.
        recorder: the backend's class of recorders.
    """
    owner: Callable[[], Any] = weakref.ref(model)
    return lambda optimizer: recorder(optimizer, plan, lambda: owner().non_trainable_weights)


def recorders_of_other_fits(model: keras.Model, fit_params: Any) -> list[Any]:
    """Return the recorders that another `fit` than this one has not detached.

    Args:
        model: the model in training.
        fit_params: the `callback.params` of this `fit()` call.
    """
    return [
        recorder
        for recorder in recorders_of(model.optimizer)
        if recorder.fit_params is not fit_params
    ]


def recorders_of(optimizer: Any) -> list[Any]:
    """Return the recorders attached to an optimizer or to those inside of it."""
    return [
        recorder for one in _inner_optimizers(optimizer) for recorder in attached_recorders(one)
    ]


def updating_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that update variables, without those that wrap them.

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
    """Return the built optimizers in a `MultiOptimizer`, or else the one that is wrapped."""
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
