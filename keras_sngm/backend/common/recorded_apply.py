"""Recording of optimizers other than SNGM, whose `apply` is replaced by one that records."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_sngm import normalization, update_rule
from keras_sngm.backend.common.measured import Measured, nonfinite_mask
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Tensor

PLAIN_RULE = update_rule.Rule(0.0, False, False, None, True, None, None, None, 0.0)
"""Hyper-parameters by which the gradient is measured before anything is done to it."""


class UpdateInputs(NamedTuple):
    """Gradients of one call of an optimizer, and the weights that they update.

    Attributes:
        gradients: one for each of `variables`.
        variables: the weights.
        indices: the index of each weight among all variables of the optimizer.
    """

    gradients: list[Any]
    variables: list[Any]
    indices: list[int]


class RecordedApply:
    """Replacement of an optimizer's `apply` that records. A backend supplies `_update`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._wrapped = optimizer.apply

    def __call__(self, grads: Any, trainable_variables: Any = None) -> None:
        """Apply gradients as the optimizer's own `apply` does, and record the update."""
        gradients = list(grads)
        variables = trainable_variables if trainable_variables is None else [*trainable_variables]
        inputs = self._update_inputs(gradients, variables)
        if inputs is not None and inputs.gradients:
            self._update(inputs, gradients, variables)
        else:
            self._apply(gradients, variables)

    def _apply(self, gradients: list[Any], variables: list[Any] | None) -> None:
        """Call the optimizer's own `apply`."""
        try:
            self._wrapped(gradients, variables)
        except Exception as error:
            if hasattr(error, "add_note"):  # since Python 3.11
                error.add_note(
                    f"Raised by `{type(self._optimizer).__name__}`, with `GradientNormLogger` or "
                    "without."
                )
            raise

    def _update_inputs(
        self, gradients: list[Any], variables: list[Any] | None
    ) -> UpdateInputs | None:
        """Return the gradients that a call updates weights with, `None` where Keras refuses to."""
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
        return UpdateInputs(
            [gradient for gradient, _ in pairs],
            [variable for _, variable in pairs],
            [optimizer._get_variable_index(variable) for _, variable in pairs],
        )

    def _update(
        self, inputs: UpdateInputs, gradients: list[Any], variables: list[Any] | None
    ) -> None:
        """Record the gradients if this call ends an update, and apply them to the variables.

        Args:
            inputs: the gradients that are not `None`, with their variables and the indices of
                these.
            gradients: the gradients of this call.
            variables: the variables of this call, or `None` for all of the optimizer's.
        """
        raise NotImplementedError


def measure(
    normalized: Normalization,
    gradients: Sequence[Tensor],
    indices: Sequence[int],
    count: int,
) -> tuple[Measured, Callable[[], dict[int, Tensor]]]:
    """Collect what was measured of the gradient of an optimizer other than SNGM.

    Args:
        normalized: how to normalize the gradient as it is, without decay and clipping.
        gradients: one tensor for each variable that has a gradient.
        indices: the index of each of these among all variables of the optimizer.
        count: number of all variables.

    Returns:
        What was measured, without a noise scale, and a function that computes each variable's part
        of g / norm(g), by its index.
    """
    norms = ops.cast(update_rule.scatter(normalized.norms, indices, count), "float32")
    nonfinite = nonfinite_mask(normalized, indices, count)
    norm = ops.cast(normalized.norm, "float32")
    return Measured(norm, norms, None, normalized.is_finite, nonfinite), lambda: dict(
        zip(indices, normalization.directions(normalized, list(gradients)), strict=True)
    )


def _build_as_keras(optimizer: Any, variables: Sequence[Any]) -> None:
    """Build an optimizer the way its own `apply` would before anything else."""
    if not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(variables)
        optimizer.built = True
