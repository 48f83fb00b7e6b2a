"""Which variables weight decay leaves alone."""

import re
from collections.abc import Iterable, Sequence
from typing import Any


class Exclusions:
    """Variables excluded from weight decay, in a form that survives saving.

    Args:
        variables: variables, or paths of variables as `get_config` gives them.
        names: regular expressions; a variable is excluded if one of them is
            found in its name.
    """

    def __init__(self, variables: Iterable[Any] = (), names: Iterable[str] = ()) -> None:
        self._variables = list(variables)
        self._names = list(names)

    def __bool__(self) -> bool:
        return bool(self._variables or self._names)

    def get_config(self) -> dict[str, list[str]]:
        """The same exclusions with paths instead of variables."""
        paths = [v if isinstance(v, str) else _path(v) for v in self._variables]
        return {"variables": paths, "names": self._names}

    def decays(self, variables: Sequence[Any]) -> tuple[bool, ...]:
        """For each of the variables, whether weight decay applies to it.

        Raises:
            ValueError: if a saved path fits several variables.
        """
        excluded = [self._find(variable, variables) for variable in self._variables]
        return tuple(
            not any(v is variable for variable in excluded)
            and not any(re.search(name, v.name) for name in self._names)
            for v in variables
        )

    def _find(self, variable: Any, candidates: Sequence[Any]) -> Any:
        if not isinstance(variable, str):
            return variable
        found = [v for v in candidates if _path(v) == variable]
        if len(found) > 1:
            raise ValueError(
                f"The variable '{variable}', saved as excluded from weight decay, is not the "
                "only one of that path. Give the layers of the model different names. "
                f"Received: variables={[_path(v) for v in candidates]}"
            )
        return found[0] if found else None


def _path(variable: Any) -> str:
    return getattr(variable, "path", variable.name)
