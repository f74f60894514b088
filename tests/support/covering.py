"""Fewer cases than all combinations, in which any few values that can meet in a fault still meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def covering(*parameters: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Return cases in which any ``strength`` values of different parameters occur together at least once.

    For parameters of which a fault can depend on any two, but not on more at once: where an operation has code of its
    own for every combination of three of them, the strength is 3. The same cases every time, in a fixed order. A
    covering array as tests of combinations use it, made greedily (Cohen et al., "The AETG System", 1997).

    Raises ``ValueError`` where there are fewer parameters than ``strength``, or one has no values.
    """
    if not 1 <= strength <= len(parameters) or not all(len(values) for values in parameters):
        raise ValueError(f"strength {strength} wants as many parameters with values, got {parameters}")
    # By place and not by value: values need not hash, and may be equal.
    places = [range(len(values)) for values in parameters]
    open_sets = {
        tuple(zip(chosen, found, strict=True))
        for chosen in combinations(range(len(parameters)), strength)
        for found in product(*(places[index] for index in chosen))
    }
    # Sorted once: the order of a set is nobody's choice.
    waiting = sorted(open_sets)
    cases: list[tuple[Any, ...]] = []
    for seed in waiting:
        if seed not in open_sets:
            continue
        case = dict(seed)
        for index in range(len(parameters)):
            if index not in case:
                case[index] = max(
                    places[index], key=lambda place, at=index: _gain(case, at, place, open_sets, strength)
                )
        open_sets -= set(combinations(sorted(case.items()), strength))
        cases.append(tuple(values[case[index]] for index, values in enumerate(parameters)))
    return cases


def _gain(
    case: dict[int, int], index: int, place: int, open_sets: set[tuple[tuple[int, int], ...]], strength: int
) -> int:
    """How many combinations that no case has yet a case would have with one more value."""
    return sum(
        tuple(sorted((*others, (index, place)))) in open_sets
        for others in combinations(sorted(case.items()), strength - 1)
    )
