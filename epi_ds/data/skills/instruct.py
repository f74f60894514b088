"""Instructions to carry out exactly on a few words, modelled after Alpaca."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from epi_ds.data.skills.task import Row, single_turn
from epi_ds.data.skills.words import WORDS

_SEPARATORS = {"dashes": "-", "slashes": "/", "plus signs": "+"}


class _Exercise(NamedTuple):
    instruction: str
    given: str
    output: str


def _words(rng: random.Random) -> list[str]:
    return rng.sample(WORDS, rng.randint(2, 3))


def _first(rng: random.Random) -> _Exercise:
    words = _words(rng)
    return _Exercise("Give the first word.", _listed(words), words[0])


def _last(rng: random.Random) -> _Exercise:
    words = _words(rng)
    return _Exercise("Give the last word.", _listed(words), words[-1])


def _upper(rng: random.Random) -> _Exercise:
    text = _listed(_words(rng))
    return _Exercise("Write in upper case.", text, text.upper())


def _join(rng: random.Random) -> _Exercise:
    words, (sign, separator) = _words(rng), rng.choice(tuple(_SEPARATORS.items()))
    return _Exercise(f"Join with {sign}.", _listed(words), separator.join(words))


def _repeat(rng: random.Random) -> _Exercise:
    words, times = rng.sample(WORDS, 2), rng.randint(2, 3)
    return _Exercise(f"Repeat {times} times.", _listed(words), _listed(words * times))


def _reverse(rng: random.Random) -> _Exercise:
    words = _words(rng)
    return _Exercise("Reverse the order.", _listed(words), _listed(words[::-1]))


def _sort(rng: random.Random) -> _Exercise:
    digits = rng.sample("0123456789", rng.randint(3, 4))
    return _Exercise("Sort the numbers.", _listed(digits), _listed(sorted(digits)))


def _count(rng: random.Random) -> _Exercise:
    words = rng.sample(WORDS, rng.randint(1, 5))
    return _Exercise("Count the words.", _listed(words), str(len(words)))


def _listed(words: Sequence[str]) -> str:
    # No space follows the commas, so that a word is the same token wherever it stands.
    return ",".join(words)


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
        return single_turn(f"{exercise.instruction}\n{exercise.given}", exercise.output, reference=exercise.output)

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether ``answer`` is the output, but for white space around it."""
        return answer.strip() == row.reference
