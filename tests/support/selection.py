"""Selection of the tests of a run: what the quick run leaves out, and what a module needs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

whole = pytest.mark.whole
"""Mark of a test, or of a case, that the quick run leaves out."""


def quick_only(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return cases for `parametrize`; the quick run has those of them that are in `quick`.

    Args:
        cases: the values of one parameter, or tuples of values of several.
        quick: some of them.
    """
    return [case if case in quick else _of_the_whole_run(case) for case in cases]


def _of_the_whole_run(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=whole)


def cases_asked_for(request: pytest.FixtureRequest, *parameters: str) -> list[tuple[Any, ...]]:
    """Return the values that parameters have in the module's tests that were selected."""
    cases = [
        tuple(item.callspec.params[name] for name in parameters)
        for item in request.session.items
        if item.path == request.path
        and hasattr(item, "callspec")
        and set(parameters) <= set(item.callspec.params)
    ]
    return list(dict.fromkeys(cases))
