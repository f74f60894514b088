"""Which cases of a test are in the first tier; CONTRIBUTING.md says what the tiers are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def values_first(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the cases of a parametrized test, of which few enough to try every value once are in the first tier.

    So every value of every parameter is tried in the first tier, and what is left of their combinations in the second.
    """
    every = list(cases)
    unseen = {place for case in every for place in _places_of(case)}
    first: list[int] = []
    while unseen:
        # Whoever has most of what no other has tried; of several the first.
        best = max(range(len(every)), key=lambda index: (len(unseen & _places_of(every[index])), -index))
        unseen -= _places_of(every[best])
        first.append(best)
    return [pytest.param(*case, marks=() if index in first else pytest.mark.slow) for index, case in enumerate(every)]


def _places_of(case: tuple[Any, ...]) -> set[tuple[int, str]]:
    """Return what a case tries: values by position. By what they are called, because some have no hash."""
    return {(position, repr(value)) for position, value in enumerate(case)}


def slow_but(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the cases of a parametrized test, of which all but the kept ones are marked ``slow``.

    cases  values, or tuples of them where there are several parameters
    kept   by equality; raises ``ValueError`` for one that is no case, which would otherwise be in no tier
    """
    every = list(cases)
    if strangers := [case for case in kept if case not in every]:
        raise ValueError(f"{strangers} are none of the cases {every}")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else pytest.mark.slow)
        for case in every
    ]
