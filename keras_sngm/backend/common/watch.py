"""Which optimizers of a model are recorded, how that begins and ends, and what is measured.

SNGM calls its recorders itself. The `apply` of any other optimizer is wrapped while a
recorder is attached to it. Nothing is built here that Keras would not build at once.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_sngm import normalization, update_rule
from keras_sngm.backend.common.optimizer import WholeModelOptimizer
from keras_sngm.backend.common.recorder import Measured, attached, nonfinite_mask
from keras_sngm.measurements import Plan
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Tensor

PLAIN_RULE = update_rule.Rule(0.0, False, False, None, True, None, None, None, 0.0)
"""Measures the gradient before anything is done to it."""

Wrap = Callable[[Any], Callable[..., None]]
"""Makes of an optimizer other than SNGM what takes the place of its `apply`."""


class Watch:
    """What one logger records of the optimizers of a model during one `fit`.

    Attributes:
        recorders: one for each optimizer that updates variables. More are added when a
            `MultiOptimizer` is built.
        root: the optimizer of the model, which may be around those that are recorded.
        fit: what this `fit` has in common with no other.
    """

    def __init__(self, model: keras.Model, fit_params: Any) -> None:
        self.recorders: list[Any] = []
        self.root = model.optimizer
        self.fit_params = fit_params

    def begin(self, make: Callable[[Any], Any], wrap: Wrap) -> None:
        """Attach a recorder to each optimizer.

        Args:
            make: makes the recorder of an optimizer.
            wrap: see `Wrap`.

        Raises:
            ValueError: if the optimizers do not accumulate over the same number of steps.
        """
        container = _unbuilt_container(self.root)
        if container is None:
            self._attach(updating(self.root), make, wrap)
        else:
            if "build" not in vars(container):
                container.build = _Build(container)
            container.build.wait(self.fit_params, lambda: self._attach_inside(make, wrap))

    def _attach_inside(self, make: Callable[[Any], Any], wrap: Wrap) -> None:
        if not self.recorders:
            self._attach(updating(self.root), make, wrap)

    def _attach(self, optimizers: Sequence[Any], make: Callable[[Any], Any], wrap: Wrap) -> None:
        for optimizer in optimizers:
            recorder = make(optimizer)
            recorder.fit_params = self.fit_params
            attached(optimizer).append(recorder)
            if not isinstance(optimizer, WholeModelOptimizer) and "apply" not in vars(optimizer):
                optimizer.apply = wrap(optimizer)
            self.recorders.append(recorder)
            recorder.open()

    def end(self) -> None:
        """Have nothing recorded any longer."""
        container = _container(self.root)
        if container is not None:
            vars(container).pop("build", None)
        for recorder in self.recorders:
            detach(recorder)


def detach(recorder: Any) -> bool:
    """Have one recorder called no longer. Returns whether it was attached."""
    optimizer = recorder.optimizer()
    if optimizer is None or recorder not in attached(optimizer):
        return False
    attached(optimizer).remove(recorder)
    if not attached(optimizer):
        vars(optimizer).pop("apply", None)
    return True


def maker(model: keras.Model, plan: Plan, recorder: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that makes the recorder of an optimizer of a model."""
    owner: Callable[[], Any] = weakref.ref(model)
    return lambda optimizer: recorder(optimizer, plan, lambda: owner().non_trainable_weights)


def left_over(model: keras.Model, fit_params: Any) -> list[Any]:
    """The recorders that another `fit` than this one has not detached."""
    return [
        recorder
        for recorder in recorders_of(model.optimizer)
        if recorder.fit_params is not fit_params
    ]


def recorders_of(optimizer: Any) -> list[Any]:
    """Return the recorders attached to an optimizer or to those inside of it."""
    return [recorder for one in _inside(optimizer) for recorder in attached(one)]


def updating(optimizer: Any) -> list[Any]:
    """The optimizers that update variables, without those around them.

    Raises:
        ValueError: if these do not accumulate over the same number of steps.
    """
    optimizers = _inside(optimizer)
    micro_batches = [one.gradient_accumulation_steps for one in optimizers]
    if len(set(micro_batches)) > 1:
        raise ValueError(
            "The optimizers of a `MultiOptimizer` can be logged together if they have the same "
            f"`gradient_accumulation_steps`. Received: {micro_batches}"
        )
    return optimizers


def _inside(optimizer: Any) -> list[Any]:
    container = _container(optimizer)
    if container is not None:
        return [one for one in container.optimizers if one.built]
    return [_unwrapped(optimizer)]


def _container(optimizer: Any) -> Any:
    """Return the `MultiOptimizer` that an optimizer is or wraps, else `None`."""
    optimizer = _unwrapped(optimizer)
    return optimizer if hasattr(optimizer, "optimizers") else None


def _unbuilt_container(optimizer: Any) -> Any:
    container = _container(optimizer)
    return None if container is None or container.built else container


def _unwrapped(optimizer: Any) -> Any:
    """Return what is inside of any number of `LossScaleOptimizer`s."""
    while getattr(optimizer, "inner_optimizer", None) is not None:
        optimizer = optimizer.inner_optimizer
    return optimizer


class _Build:
    """Takes the place of the `build` of a `MultiOptimizer`, which shows what it consists of."""

    def __init__(self, optimizer: Any) -> None:
        self._build = optimizer.build
        self._waiting: list[tuple[Any, Callable[[], None]]] = []

    def wait(self, fit_params: Any, attach: Callable[[], None]) -> None:
        """Call `attach` once the optimizer is built. Forgets those of any other `fit`."""
        self._waiting = [one for one in self._waiting if one[0] is fit_params]
        self._waiting.append((fit_params, attach))

    def __call__(self, variables: Sequence[Any]) -> None:
        self._build(variables)
        for _, attach in self._waiting:
            attach()


class Given(NamedTuple):
    """What weights are updated with.

    Attributes:
        gradients: one for each of `variables`.
        variables: the weights.
        positions: where they are among all variables of the optimizer.
    """

    gradients: list[Any]
    variables: list[Any]
    indices: list[int]


class Watched:
    """Takes the place of an optimizer's `apply`. A backend supplies `_update`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._wrapped = optimizer.apply

    def __call__(self, grads: Any, trainable_variables: Any = None) -> None:
        gradients = list(grads)
        variables = trainable_variables if trainable_variables is None else [*trainable_variables]
        given = self._given(gradients, variables)
        if given is not None and given.gradients:
            self._update(given, gradients, variables)
        else:
            self._apply(gradients, variables)

    def _apply(self, gradients: list[Any], variables: list[Any] | None) -> None:
        """Have the optimizer do what it would do without a recorder."""
        try:
            self._wrapped(gradients, variables)
        except Exception as error:
            if hasattr(error, "add_note"):  # since Python 3.11
                error.add_note(
                    f"Raised by `{type(self._optimizer).__name__}`, with `GradientNormLogger` or "
                    "without."
                )
            raise

    def _given(self, gradients: list[Any], variables: list[Any] | None) -> Given | None:
        """Return what an update would be made with, `None` where Keras refuses to make it."""
        optimizer = self._optimizer
        if gradients and variables is not None:
            _build_as_keras(optimizer, variables)
        if variables is None and optimizer.built:
            variables = optimizer._trainable_variables
        if variables is None or len(gradients) != len(variables):
            return None
        try:
            optimizer._check_variables_are_known(variables)
        except ValueError:
            return None
        pairs = [
            (gradient, variable)
            for gradient, variable in zip(gradients, variables, strict=True)
            if gradient is not None and not getattr(variable, "overwrite_with_gradient", False)
        ]
        return Given(
            [gradient for gradient, _ in pairs],
            [variable for _, variable in pairs],
            [optimizer._get_variable_index(variable) for _, variable in pairs],
        )

    def _update(self, given: Given, gradients: list[Any], variables: list[Any] | None) -> None:
        """Record, and apply the gradients to the variables."""
        raise NotImplementedError


def _build_as_keras(optimizer: Any, variables: Sequence[Any]) -> None:
    """Build an optimizer as its `apply`, called with these variables, would do first of all."""
    if not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(variables)
        optimizer.built = True


def measured(
    normalized: Normalization,
    gradients: Sequence[Tensor],
    indices: Sequence[int],
    count: int,
) -> tuple[Measured, Callable[[], dict[int, Tensor]]]:
    """The norms of a gradient, and a function that divides it by its norm.

    Args:
        normalized: how to normalize it, by the rule `AS_IT_IS`.
        gradients: one tensor for each of some variables.
        positions: where they are among all variables of the optimizer.
        count: how many these are.
    """
    norms = ops.cast(update_rule.scatter(normalized.norms, indices, count), "float32")
    nonfinite = nonfinite_mask(normalized, indices, count)
    norm = ops.cast(normalized.norm, "float32")
    return Measured(norm, norms, None, normalized.is_finite, nonfinite), lambda: dict(
        zip(indices, normalization.directions(normalized, list(gradients)), strict=True)
    )
