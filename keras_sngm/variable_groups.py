"""Which variables are shown together, and under which name."""

from collections.abc import Callable, Sequence
from typing import Any

PerVariable = bool | int | Callable[[Any], bool]


def check_per_variable(per_variable: Any) -> None:
    """Refuse what `groups_of` cannot take."""
    is_depth = isinstance(per_variable, int) and per_variable >= 1
    if not (isinstance(per_variable, bool) or is_depth or callable(per_variable)):
        raise ValueError(
            "`per_variable` must be a boolean, an integer >= 1 or a function of a variable. "
            f"Received: per_variable={per_variable}"
        )


def groups_of(variables: Sequence[Any], per_variable: PerVariable) -> dict[str, list[int]]:
    """Positions of the variables that belong to each name.

    Args:
        variables: Keras variables.
        per_variable: `False` for none; `True` for one group for each variable, named
            by its path; a function for those variables alone for which it is true; an
            integer for one group for all variables whose paths begin with the same so
            many parts.
    """
    if per_variable is False:
        return {}
    depth = None
    chosen = list(range(len(variables)))
    if callable(per_variable):
        chosen = [i for i in chosen if per_variable(variables[i])]
    elif per_variable is not True:
        depth = per_variable
    groups: dict[str, list[int]] = {}
    for i in chosen:
        name = "/".join(variables[i].path.split("/")[:depth])
        groups.setdefault(name if depth else _unused(name, groups), []).append(i)
    return groups


def _unused(name: str, taken: dict[str, Any]) -> str:
    """Keras does not see to it that paths differ."""
    names = [name, *(f"{name}_{k}" for k in range(1, len(taken) + 1))]
    return next(candidate for candidate in names if candidate not in taken)
