"""Multiple-choice deductions in propositional logic, modelled after LogiQA."""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from epi_ds.data.skills.task import Row, single_turn
from epi_ds.data.skills.words import EVENTS, NAMES, TRAITS

LETTERS = "ABCD"

_LETTER = re.compile(rf"\b[{LETTERS}]\b")


class Literal(NamedTuple):
    """A statement that is claimed to be true, or false."""

    statement: str
    """The letter of an option, or an event that is no option."""
    holds: bool = True


class Premise(NamedTuple):
    """Something a puzzle states: at least one of the literals is right."""

    any_of: tuple[Literal, ...]
    text: str


class Puzzle(NamedTuple):
    """Premises, and whether the option asked for must be true or must be false."""

    premises: tuple[Premise, ...]
    asks_for: bool


def entails(premises: Sequence[Premise], claim: Literal) -> bool:
    """Tell whether a claim is right under every truth assignment that makes all premises true.

    Premises that contradict each other entail everything.
    """
    literals = [literal for premise in premises for literal in premise.any_of]
    statements = sorted({literal.statement for literal in [*literals, claim]})
    for values in itertools.product((False, True), repeat=len(statements)):
        world = dict(zip(statements, values, strict=True))
        if world[claim.statement] == claim.holds:
            continue
        if all(any(world[one.statement] == one.holds for one in premise.any_of) for premise in premises):
            return False
    return True


def right_options(puzzle: Puzzle) -> list[str]:
    """Return the letters of all options that follow, but for those a premise states outright."""
    claims = [Literal(letter, puzzle.asks_for) for letter in LETTERS]
    stated = {premise.any_of[0] for premise in puzzle.premises if len(premise.any_of) == 1}
    return [claim.statement for claim in claims if claim not in stated and entails(puzzle.premises, claim)]


def _fact(statement: str, holds: bool) -> Premise:
    return Premise((Literal(statement, holds),), f"{statement} is {'true' if holds else 'false'}.")


def _implies(first: str, then: str) -> Premise:
    return Premise((Literal(first, False), Literal(then)), f"If {first}, then {then}.")


def _either(left: str, right: str) -> Premise:
    return Premise((Literal(left), Literal(right)), f"{left} or {right} is true.")


def _not_both(left: str, right: str) -> Premise:
    return Premise((Literal(left, False), Literal(right, False)), f"{left} and {right} are not both true.")


def _modus_ponens(a: str, b: str, c: str, event: str) -> Puzzle:
    return Puzzle((_implies(a, b), _fact(a, True)), asks_for=True)


def _modus_tollens(a: str, b: str, c: str, event: str) -> Puzzle:
    return Puzzle((_implies(a, b), _fact(b, False)), asks_for=False)


def _disjunctive_syllogism(a: str, b: str, c: str, event: str) -> Puzzle:
    return Puzzle((_either(a, b), _fact(a, False)), asks_for=True)


def _exclusion(a: str, b: str, c: str, event: str) -> Puzzle:
    return Puzzle((_not_both(a, b), _fact(a, True)), asks_for=False)


def _transitivity(a: str, b: str, c: str, event: str) -> Puzzle:
    return Puzzle((_implies(a, event), _implies(event, b), _fact(a, True)), asks_for=True)


def _converse(a: str, b: str, c: str, event: str) -> Puzzle:
    """Tempt to affirm the consequent: ``c`` would imply what is given, but does not follow from it."""
    return Puzzle((_implies(c, a), _implies(a, b), _fact(a, True)), asks_for=True)


TEMPLATES: tuple[Callable[[str, str, str, str], Puzzle], ...] = (
    _modus_ponens,
    _modus_tollens,
    _disjunctive_syllogism,
    _exclusion,
    _transitivity,
    _converse,
)


class Logic:
    """Puzzles about four statements, exactly one of which follows from two or three premises."""

    name = "logic"

    def draw(self, rng: random.Random) -> Row:
        """Draw one puzzle."""
        person, traits = rng.choice(NAMES), rng.sample(TRAITS, len(LETTERS))
        a, b, c = rng.sample(LETTERS, 3)
        puzzle = rng.choice(TEMPLATES)(a, b, c, rng.choice(EVENTS))
        (right,) = right_options(puzzle)
        lines = [f"{letter}. {person} is {trait}" for letter, trait in zip(LETTERS, traits, strict=True)]
        lines.append(" ".join(premise.text for premise in puzzle.premises))
        lines.append(f"Which other one must be {'true' if puzzle.asks_for else 'false'}?")
        return single_turn("\n".join(lines), right, reference=right)

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether ``answer`` names the right letter and no other."""
        return set(_LETTER.findall(answer)) == {row.reference}
