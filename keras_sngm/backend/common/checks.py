"""Checks of the gradients that an optimizer is called with."""

import collections
from collections.abc import Sequence
from typing import Any


def check_each_variable_is_given_once(indices: Sequence[int], variables: Sequence[Any]) -> None:
    """Raise a `ValueError` if there are several gradients for one variable.

    Args:
        indices: the index of each given variable among those of the optimizer.
        variables: the given variables, in the same order.
    """
    if len(set(indices)) < len(variables):
        counts = collections.Counter(variable.path for variable in variables)
        raise ValueError(
            "A variable can have one gradient in a step. Received: several for "
            + ", ".join(f"'{path}'" for path, count in counts.items() if count > 1)
        )


def check_shapes(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Raise a `ValueError` if a gradient does not have the shape of its variable."""
    for gradient, variable in zip(gradients, variables, strict=True):
        # A `tf.IndexedSlices` need not know its shape.
        shape: Any = getattr(gradient, "shape", None)
        if shape != variable.shape and not _is_compatible(shape, variable.shape):
            raise ValueError(
                "A gradient must have the shape of its variable. "
                f"Received: gradient.shape={tuple(shape)} for "
                f"variable '{variable.name}' of shape {tuple(variable.shape)}"
            )


def _is_compatible(shape: Any, wanted: Any) -> bool:
    """Return whether a shape can be the wanted one, because it is unknown, or known in part.

    Args:
        shape: a `tf.TensorShape` or `None`. A tuple is known, and taken for another shape.
        wanted: the shape of the variable.
    """
    if shape is None:
        return True
    # In a graph TensorFlow may know a shape only in part.
    is_compatible = getattr(shape, "is_compatible_with", None)
    return is_compatible is not None and is_compatible(wanted)
