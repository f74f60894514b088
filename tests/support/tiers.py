"""Which cases of a test are in the first tier; CONTRIBUTING.md says what the tiers are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def values_first(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the cases of a parametrized test; those in which every value has occurred before are marked ``slow``.

    So every value of every parameter is tried in the first tier, and what is left of their combinations in the second.
    """
    seen: list[tuple[int, Any]] = []
    found = []
    for case in cases:
        new = [place for place in enumerate(case) if place not in seen]
        seen += new
        found.append(pytest.param(*case, marks=() if new else pytest.mark.slow))
    return found


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
