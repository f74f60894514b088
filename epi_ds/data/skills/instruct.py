"""Instructions to carry out exactly on a few words, modelled after Alpaca."""

import random
from collections.abc import Callable
from typing import NamedTuple

from epi_ds.data.skills.task import Row, single_turn
from epi_ds.data.skills.words import WORDS

_SEPARATORS = {"dashes": "-", "slashes": "/", "commas": ", "}


class _Exercise(NamedTuple):
    instruction: str
    output: str


def _words(rng: random.Random) -> list[str]:
    return rng.sample(WORDS, rng.randint(2, 4))


def _first(rng: random.Random) -> _Exercise:
    words = _words(rng)
    return _Exercise(f"Give the first word of: {' '.join(words)}", words[0])


def _last(rng: random.Random) -> _Exercise:
    words = _words(rng)
    return _Exercise(f"Give the last word of: {' '.join(words)}", words[-1])


def _upper(rng: random.Random) -> _Exercise:
    text = " ".join(_words(rng))
    return _Exercise(f"Write in upper case: {text}", text.upper())


def _join(rng: random.Random) -> _Exercise:
    words, (sign, separator) = _words(rng), rng.choice(tuple(_SEPARATORS.items()))
    return _Exercise(f"Join with {sign}: {' '.join(words)}", separator.join(words))


def _repeat(rng: random.Random) -> _Exercise:
    text, times = " ".join(rng.sample(WORDS, 2)), rng.randint(2, 4)
    return _Exercise(f"Repeat {times} times: {text}", " ".join([text] * times))


def _reverse(rng: random.Random) -> _Exercise:
    words = _words(rng)
    return _Exercise(f"Reverse the order of: {' '.join(words)}", " ".join(reversed(words)))


def _sort(rng: random.Random) -> _Exercise:
    digits = rng.sample("0123456789", rng.randint(3, 4))
    return _Exercise(f"Sort these numbers: {' '.join(digits)}", " ".join(sorted(digits)))


def _count(rng: random.Random) -> _Exercise:
    words = rng.sample(WORDS, rng.randint(1, 5))
    return _Exercise(f"Count the words in: {' '.join(words)}", str(len(words)))


_TEMPLATES: tuple[Callable[[random.Random], _Exercise], ...] = (
    _first,
    _last,
    _upper,
    _join,
    _repeat,
    _reverse,
    _sort,
    _count,
)


class Instruct:
    """Instructions with a single right output, such as joining or sorting what they list."""

    name = "instruct"

    def draw(self, rng: random.Random) -> Row:
        """Draw one instruction."""
        exercise = rng.choice(_TEMPLATES)(rng)
        return single_turn(exercise.instruction, exercise.output, reference=exercise.output)

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether `answer` is the output, but for white space around it."""
        return answer.strip() == row.reference
