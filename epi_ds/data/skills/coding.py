"""Short Python functions to write, modelled after CodeAlpaca and checked by running them."""

import json
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from epi_ds.data.skills.safe_eval import RefusedCodeError, Value, call, parse_function
from epi_ds.data.skills.task import Row, single_turn

_FUNCTIONS = tuple("apply calc compute f find g get h job make run solve step task use work".split())
_PARAMETERS = tuple("abkmntvx")
_NUMBERS = (-7, -1, 0, 1, 2, 5, 30, 101)
_LISTS: tuple[Value, ...] = ([3, -1, 4, 15, 9, 2, 6, 5, 35, 8, 97], [7, 0], [12, -40, 8], [])


class _Problem(NamedTuple):
    wish: str
    expression: str
    inputs: Sequence[Value]


def _around(number: int) -> tuple[int, ...]:
    """Return inputs that tell a comparison or an offset by ``number`` from its neighbours."""
    return (number - 1, number, number + 1, 2 * number, *_NUMBERS)


def _counted(stop: int) -> Value:
    """Return 0, 1, ... up to ``stop``, long enough to tell a prefix or a sum from its neighbours."""
    return [*range(stop)]


def _plus(x: str, k: int) -> _Problem:
    return _Problem(f"{x} plus {k}", f"{x} + {k}", _around(k))


def _minus(x: str, k: int) -> _Problem:
    return _Problem(f"{x} minus {k}", f"{x} - {k}", _around(k))


def _times(x: str, k: int) -> _Problem:
    return _Problem(f"{x} times {k}", f"{x} * {k}", _around(k))


def _above(x: str, k: int) -> _Problem:
    return _Problem(f"True if {x} is greater than {k}", f"{x} > {k}", _around(k))


def _divisible(x: str, k: int) -> _Problem:
    return _Problem(f"True if {x} is divisible by {k}", f"{x} % {k} == 0", _around(k))


def _larger(x: str, k: int) -> _Problem:
    return _Problem(f"the larger of {x} and {k}", f"max({x}, {k})", _around(k))


def _prefix(x: str, k: int) -> _Problem:
    return _Problem(f"the first {k} items of the list {x}", f"{x}[:{k}]", [_counted(2 * k), *_LISTS])


def _total(x: str, k: int) -> _Problem:
    return _Problem(f"the sum of the list {x} plus {k}", f"sum({x}) + {k}", [_counted(k), *_LISTS])


_TEMPLATES: tuple[Callable[[str, int], _Problem], ...] = (
    _plus,
    _minus,
    _times,
    _above,
    _divisible,
    _larger,
    _prefix,
    _total,
)


class Code:
    """One-line functions to write, checked by computing them on several inputs.

    The reference of a row is JSON: the function's name, and pairs of an argument and the value to return.
    """

    name = "code"

    def draw(self, rng: random.Random) -> Row:
        """Draw one function to write."""
        function, x = rng.choice(_FUNCTIONS), rng.choice(_PARAMETERS)
        problem = rng.choice(_TEMPLATES)(x, rng.randint(2, 20))
        answer = f"def {function}({x}):\n    return {problem.expression}"
        parsed = parse_function(answer)
        cases = [[argument, call(parsed, [argument])] for argument in problem.inputs]
        question = f"Write a Python function {function}({x}) that returns {problem.wish}."
        return single_turn(question, answer, reference=json.dumps({"name": function, "cases": cases}))

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether ``answer`` is a function of the right name that returns the right values."""
        reference = json.loads(row.reference)
        try:
            function = parse_function(answer)
            results = [call(function, [argument]) for argument, _ in reference["cases"]]
        except RefusedCodeError:
            return False
        # As JSON, True and 1 differ, and so do 1 and 1.0.
        expected = json.dumps([value for _, value in reference["cases"]])
        return function.name == reference["name"] and json.dumps(results) == expected
