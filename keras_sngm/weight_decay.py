"""Exclusions from weight decay."""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class Exclusions:
    """Variables excluded from weight decay, in a form that can be saved.

    Args:
        variables: the excluded variables themselves, or the indices and paths that
            `get_config` saves in their place.
        names: regular expressions; a variable is excluded if one of them is
            found in its path, such as `encoder/dense/kernel`, or in its name, `kernel`.
    """

    def __init__(self, variables: Iterable[Any] = (), names: Iterable[str] = ()) -> None:
        self._entries = list(variables)
        self._names = list(names)

    def __bool__(self) -> bool:
        """Return whether anything is excluded."""
        return bool(self._entries or self._names)

    def decays(self, variables: Sequence[Any]) -> tuple[bool, ...]:
        """Return for each of the variables whether weight decay applies to it.

        It does not if the variable was excluded itself, or if one of the excluded names, a regular
        expression, is found in its path or its name.

        Args:
            variables: Keras or TensorFlow variables.

        Raises:
            ValueError: if an exclusion that was saved as a path does not fit exactly one variable.
        """
        if not self:
            return (True,) * len(variables)
        excluded = set(self._positions_in(variables))
        return tuple(
            i not in excluded and not any(_is_named(v, name) for name in self._names)
            for i, v in enumerate(variables)
        )

    def located_in(self, variables: Sequence[Any]) -> "Exclusions":
        """Return the same exclusions, those of single variables as indices into `variables`.

        Exclusions by name stay names.

        Args:
            variables: the variables that the optimizer is built with.

        Raises:
            ValueError: if an exclusion that was saved as a path does not fit exactly one variable.
        """
        return Exclusions(self._positions_in(variables), self._names)

    def warn_of_idle(self, variables: Sequence[Any]) -> None:
        """Warn of exclusions that apply to none of the variables."""
        idle = [name for name in self._names if not any(_is_named(v, name) for v in variables)]
        if idle:
            warnings.warn(
                f"`exclude_from_weight_decay(var_names={idle})` excludes nothing: found in the "
                "path of no variable that the optimizer was built with. "
                f"Received: variables={[_path(v) for v in variables]}",
                stacklevel=4,
            )
        saved = (int, str)
        others = [
            _path(entry)
            for entry in self._entries
            if not isinstance(entry, saved) and not any(v is entry for v in variables)
        ]
        if others:
            warnings.warn(
                f"`exclude_from_weight_decay(var_list=...)` has variables that the optimizer was "
                f"not built with, which has no effect. Received: {others}",
                stacklevel=4,
            )

    def _positions_in(self, variables: Sequence[Any]) -> list[int]:
        """Return the indices of the variables that are excluded one by one, not by name.

        Args:
            variables: the variables to look in.

        Raises:
            ValueError: if an exclusion that was saved as a path does not fit exactly one variable.
        """
        positions: list[int] = []
        for entry in self._entries:
            if isinstance(entry, int):
                positions.append(entry)
            elif isinstance(entry, str):
                positions.append(_position_of_path(entry, variables))
            else:
                positions += [i for i, v in enumerate(variables) if v is entry]
        return positions

    def get_config(self) -> dict[str, list[Any]]:
        """Return the exclusions as plain data, which the constructor takes.

        Names are regular expressions, as given. Once the optimizer is built a variable is saved as
        its index among the optimizer's variables, before as its path: Keras changes paths when it
        loads a model.
        """
        entries = [v if isinstance(v, (int, str)) else _path(v) for v in self._entries]
        return {"variables": entries, "names": list(self._names)}


def _position_of_path(path: str, variables: Sequence[Any]) -> int:
    """Return the index of the one variable that a saved path belongs to.

    If no path is equal, one of the two may be a suffix of the other: layers may have been put
    into another model since, or taken out of one.

    Raises:
        ValueError: if no variable or more than one fits.
    """
    paths = [_path(v) for v in variables]
    fitting = [i for i, p in enumerate(paths) if p == path]
    fitting = fitting or [
        i for i, p in enumerate(paths) if f"/{p}".endswith(f"/{path}") or path.endswith(f"/{p}")
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"The variable '{path}', which this optimizer was saved as excluding from weight "
            f"decay, fits {len(fitting)} of the model's variables instead of one. "
            "Call `exclude_from_weight_decay()` again. "
            f"Received: variables={paths}"
        )
    return fitting[0]


def _is_named(variable: Any, name: str) -> bool:
    """Return whether a regular expression is found in a variable's path or name."""
    return bool(re.search(name, _path(variable)) or re.search(name, variable.name))


def _path(variable: Any) -> str:
    """Return a variable's path, or its name if it has none, as a `tf.Variable`."""
    return getattr(variable, "path", variable.name)
