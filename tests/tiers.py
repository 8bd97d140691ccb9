"""The cases of a test in three tiers (CONTRIBUTING.md): a law keeps one early, the others come at night."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def tiered(
    cases: Iterable[T], *, now: Collection[T] = (), ci: Collection[T] = (), id: Callable[[T], str] = str
) -> list[Any]:
    """Parameters: `make test` runs those in `now`, continuous integration those in `ci`, too, and the night all.

    A case that is a tuple is several parameters. Raises ValueError for what is in `now` or `ci` and is no case.
    """
    cases = [*cases]
    if strangers := [one for one in (*now, *ci) if one not in cases]:
        raise ValueError(f"no cases: {strangers}")

    def marks(case: T) -> list[pytest.MarkDecorator]:
        if case in now:
            return []
        return [pytest.mark.slow] if case in ci else [pytest.mark.nightly]

    def parameter(case: T) -> Any:  # noqa: ANN401, a parameter
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=marks(case), id=id(case))

    return [parameter(case) for case in cases]
