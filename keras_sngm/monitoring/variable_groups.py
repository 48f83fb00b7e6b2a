"""Which variables are shown together, and under which name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

PerVariable = bool | int | str | Callable[[Any], bool]


def check_per_variable(per_variable: Any) -> None:
    """Refuse what `groups_of` cannot take."""
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
    """Positions of the variables that belong to each name.

    Args:
        variables: Keras variables.
        per_variable: `False` for none; `True` for one group for each variable, named
            by its path; `"layer"` for one group for each layer of the model; a function
            for those variables alone for which it is true; an integer for one group for
            all variables whose paths begin with the same so many parts.
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
    """One group for each entry, though Keras does not see to it that paths differ."""
    groups: dict[str, list[int]] = {}
    for i, name in entries:
        groups[_unused(name, groups)] = [i]
    return groups


def _by_layer(variables: Sequence[Any], model: keras.Model) -> dict[str, list[int]]:
    """Group variables by the layer that has them, those that no layer has by their folder."""
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
    names = [name, *(f"{name}_{k}" for k in range(1, len(used) + 1))]
    return next(candidate for candidate in names if candidate not in used)
