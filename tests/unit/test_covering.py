"""The cases that stand for all combinations hold what they promise to hold."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, product
from typing import Any

import pytest

from tests.support.covering import covering
from tests.support.tiers import slow_but, values_first

PARAMETERS: list[list[list[Any]]] = [
    [[1, 2, 3], ["a", "b"]],
    [[0, 1, 2], list("abcd"), list(range(7)), [True, False, None]],
    # Values that do not hash, that are equal, and one that is alone.
    [[[1], [2]], [{}, {}, {}], ["alone"], [1, 2, 3, 4, 5]],
    [list(range(size)) for size in (2, 2, 2, 2, 2, 2, 9)],
]


def places_of(parameters: list[list[Any]], strength: int) -> list[tuple[int, ...]]:
    """Cases by the places of their values."""
    return covering(*(range(len(values)) for values in parameters), strength=strength)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_so_many_values_is_in_a_case(parameters: list[list[Any]], strength: int) -> None:
    if strength > len(parameters):
        with pytest.raises(ValueError, match=f"strength {strength} wants as many parameters"):
            covering(*parameters, strength=strength)
        return
    cases = places_of(parameters, strength)
    for chosen in combinations(range(len(parameters)), strength):
        found = {tuple(case[index] for index in chosen) for case in cases}
        assert found == set(product(*(range(len(parameters[index])) for index in chosen)))
    # The values themselves, in their parameters' order.
    assert covering(*parameters, strength=strength) == [
        tuple(values[place] for values, place in zip(parameters, case, strict=True)) for case in cases
    ]


def test_cases_are_few_and_all_different() -> None:
    cases = covering(range(3), range(4), range(7), range(4))
    assert len(set(cases)) == len(cases)
    # No fewer than the two longest parameters have pairs; of 336 combinations.
    assert 28 <= len(cases) <= 34
    assert 112 <= len(covering(range(3), range(4), range(7), range(4), strength=3)) <= 150
    assert covering(range(3), range(4), strength=2) == list(product(range(3), range(4)))


def test_a_parameter_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="strength 2 wants as many parameters with values"):
        covering([1, 2], [])


def test_every_process_makes_the_same_cases() -> None:
    """Two processes of pytest-xdist must collect the same tests."""
    script = "from tests.support.covering import covering; print(covering('ab', 'cde', 'fghi', 'jk'))"
    printed = {
        subprocess.run(
            ["env", f"PYTHONHASHSEED={seed}", sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(printed) == 1


def test_cases_that_are_not_kept_are_slow() -> None:
    def names(params: list[Any]) -> list[tuple[Any, ...]]:
        return [(*one.values, *(mark.name for mark in one.marks)) for one in params]

    assert names(slow_but([1, 2, 3], 2)) == [(1, "slow"), (2,), (3, "slow")]
    assert names(slow_but([(1, "a"), (2, "b")], (2, "b"))) == [(1, "a", "slow"), (2, "b")]
    with pytest.raises(ValueError, match=r"\[4\] are none of the cases \[1, 2, 3\]"):
        slow_but([1, 2, 3], 1, 4)
    pairs = [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (1, [])]
    assert names(values_first(pairs)) == [(1, "a"), (1, "b", "slow"), (2, "a", "slow"), (2, "b"), (1, [])]
