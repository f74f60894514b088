"""Short arithmetic word problems, modelled after GSM8K."""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from epi_ds.data.skills.task import Row, single_turn
from epi_ds.data.skills.words import NAMES, OBJECTS

_NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:\.[0-9]+)?")


class _Problem(NamedTuple):
    question: str
    working: str
    result: int


def _small(rng: random.Random) -> int:
    return rng.randint(2, 9)


def _buy(rng: random.Random) -> _Problem:
    name, thing, a, b = rng.choice(NAMES), rng.choice(OBJECTS), _small(rng), _small(rng)
    question = f"{name} has {a} {thing}. {name} buys {b} more. How many {thing} does {name} have now?"
    return _Problem(question, f"{a} + {b} = {a + b}.", a + b)


def _give(rng: random.Random) -> _Problem:
    (name, friend), thing = rng.sample(NAMES, 2), rng.choice(OBJECTS)
    b, rest = _small(rng), _small(rng)
    a = b + rest
    question = f"{name} has {a} {thing}. {name} gives {b} to {friend}. How many {thing} are left?"
    return _Problem(question, f"{a} - {b} = {rest}.", rest)


def _together(rng: random.Random) -> _Problem:
    (name, friend), thing = rng.sample(NAMES, 2), rng.choice(OBJECTS)
    a, b = _small(rng), _small(rng)
    question = f"{name} has {a} {thing} and {friend} has {b}. How many {thing} do they have in total?"
    return _Problem(question, f"{a} + {b} = {a + b}.", a + b)


def _bags(rng: random.Random) -> _Problem:
    name, thing, a, b = rng.choice(NAMES), rng.choice(OBJECTS), rng.randint(2, 5), rng.randint(2, 5)
    question = f"{name} has {a} bags with {b} {thing} in each. How many {thing} does {name} have?"
    return _Problem(question, f"{a} * {b} = {a * b}.", a * b)


def _lose(rng: random.Random) -> _Problem:
    name, thing, a, b = rng.choice(NAMES), rng.choice(OBJECTS), _small(rng), _small(rng)
    total = a + b
    c = rng.randint(2, 4)
    question = f"{name} has {a} {thing}, buys {b} more and loses {c}. How many {thing} are left?"
    return _Problem(question, f"{a} + {b} = {total}. {total} - {c} = {total - c}.", total - c)


def _find(rng: random.Random) -> _Problem:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    a, b, c = _small(rng), _small(rng), rng.randint(2, 4)
    question = f"{name} has {a} {thing}, buys {b} more and finds {c}. How many {thing} does {name} have now?"
    return _Problem(question, f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}.", a + b + c)


_TEMPLATES: tuple[Callable[[random.Random], _Problem], ...] = (_buy, _give, _together, _bags, _lose, _find)


class Arithmetic:
    """Word problems with one or two steps over small numbers, answered by the working and the result."""

    name = "arithmetic"

    def draw(self, rng: random.Random) -> Row:
        """Draw one word problem."""
        problem = rng.choice(_TEMPLATES)(rng)
        answer = f"{problem.working} The answer is {problem.result}."
        return single_turn(problem.question, answer, reference=str(problem.result))

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether the last number in ``answer`` is the result."""
        numbers = _NUMBER.findall(answer)
        return bool(numbers) and numbers[-1] == row.reference
