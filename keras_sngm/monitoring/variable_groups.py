"""Groups of variables that are logged under one name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

PerVariable = bool | int | str | Callable[[Any], bool]


def check_per_variable(per_variable: Any) -> None:
    """Raise a `ValueError` if `per_variable` is nothing that `groups_of` takes."""
    is_depth = isinstance(per_variable, int) and per_variable >= 1
    is_known = isinstance(per_variable, bool) or is_depth or per_variable == "layer"
    if not (is_known or callable(per_variable)):
        raise ValueError(
            '`per_variable` must be a boolean, "layer", an integer >= 1 or a function of a '
            f"variable. Received: per_variable={per_variable}"
        )


def groups_of(
    variables: Sequence[Any], per_variable: PerVariable, model: keras.Model
) -> dict[str, list[int]]:
    """Return the names of groups of variables, each with the indices of its variables.

    Args:
        variables: Keras variables.
        per_variable: `False` for no groups; `True` for one group for each variable, named
            by its path; `"layer"` for one group for each layer of the model; a function
            for groups of those variables alone that it is true for; an integer for one group
            for all variables whose paths begin with the same so many parts.
        model: the model that the variables belong to.
    """
    if per_variable is False:
        return {}
    indices = range(len(variables))
    if per_variable is True:
        return _named([(i, variables[i].path) for i in indices])
    if per_variable == "layer":
        return _by_layer(variables, model)
    if callable(per_variable):
        return _named([(i, variables[i].path) for i in indices if per_variable(variables[i])])
    groups: dict[str, list[int]] = {}
    for i in indices:
        name = "/".join(variables[i].path.split("/")[:per_variable])
        groups.setdefault(name, []).append(i)
    return groups


def _named(entries: Sequence[tuple[int, str]]) -> dict[str, list[int]]:
    """Return one group for each index and name; a name that is taken gets a number.

    Keras does not make sure that paths of variables differ.
    """
    groups: dict[str, list[int]] = {}
    for i, name in entries:
        groups[_unused(name, groups)] = [i]
    return groups


def _by_layer(variables: Sequence[Any], model: keras.Model) -> dict[str, list[int]]:
    """Return groups of variables by the layer that has them.

    A variable that no layer has is in a group named by its path without the last part.
    """
    owners = {id(v): layer for layer in _layers(model) for v in reversed(layer.variables)}
    names: dict[Any, str] = {}
    groups: dict[str, list[int]] = {}
    for i, variable in enumerate(variables):
        layer = owners.get(id(variable))
        folder = variable.path.rpartition("/")[0] or variable.path
        key = folder if layer is None else id(layer)
        if key not in names:
            path = folder if layer is None else layer.path or layer.name
            names[key] = _unused(path, groups)
        groups.setdefault(names[key], []).append(i)
    return groups


def _layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yield the layers of a model, and in place of models among them the layers of these."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
        else:
            yield layer


def _unused(name: str, used: dict[str, Any]) -> str:
    """Return a name, with the least number that makes it differ from those that are used."""
    names = [name, *(f"{name}_{k}" for k in range(1, len(used) + 1))]
    return next(candidate for candidate in names if candidate not in used)
