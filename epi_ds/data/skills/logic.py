"""Multiple-choice deductions in propositional logic, modelled after LogiQA."""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from epi_ds.data.skills.task import Row, single_turn
from epi_ds.data.skills.words import NAMES, TRAITS

LETTERS = "ABCD"

_LETTER = re.compile(rf"\b[{LETTERS}]\b")


class Literal(NamedTuple):
    """A trait that somebody has, or does not have."""

    trait: str
    holds: bool = True

    def negated(self) -> "Literal":
        """Return the opposite claim about the same trait."""
        return Literal(self.trait, not self.holds)

    def says(self, name: str) -> str:
        """Write the claim about `name` as a clause."""
        return f"{name} is {self.trait}" if self.holds else f"{name} is not {self.trait}"


class Premise(NamedTuple):
    """Something a puzzle states: at least one of the literals is true."""

    any_of: tuple[Literal, ...]
    text: str


def fact(name: str, literal: Literal) -> Premise:
    """State a literal outright."""
    return Premise((literal,), f"{literal.says(name)}.")


def implies(name: str, first: Literal, then: Literal) -> Premise:
    """State that `then` holds whenever `first` does."""
    return Premise((first.negated(), then), f"If {first.says(name)}, {then.says(name)}.")


def either(name: str, left: Literal, right: Literal) -> Premise:
    """State that at least one of two literals holds."""
    return Premise((left, right), f"{left.says(name)} or {right.says(name)}.")


def entails(premises: Sequence[Premise], claim: Literal) -> bool:
    """Tell whether a claim is true under every truth assignment that makes all premises true.

    Args:
        premises: What is given.
        claim: What might follow from it.

    Returns:
        Whether it follows. Premises that contradict each other entail everything.
    """
    literals = [literal for premise in premises for literal in premise.any_of]
    traits = sorted({literal.trait for literal in [*literals, claim]})
    for values in itertools.product((False, True), repeat=len(traits)):
        world = dict(zip(traits, values, strict=True))
        if world[claim.trait] == claim.holds:
            continue
        if all(any(world[one.trait] == one.holds for one in premise.any_of) for premise in premises):
            return False
    return True


def _modus_ponens(name: str, a: Literal, b: Literal, _: Literal) -> list[Premise]:
    return [implies(name, a, b), fact(name, a)]


def _modus_tollens(name: str, a: Literal, b: Literal, _: Literal) -> list[Premise]:
    return [implies(name, a, b), fact(name, b.negated())]


def _disjunctive_syllogism(name: str, a: Literal, b: Literal, _: Literal) -> list[Premise]:
    return [either(name, a, b), fact(name, a.negated())]


def _transitivity(name: str, a: Literal, b: Literal, c: Literal) -> list[Premise]:
    return [implies(name, a, b), implies(name, b, c), fact(name, a)]


def _unused_rule(name: str, a: Literal, b: Literal, c: Literal) -> list[Premise]:
    return [implies(name, a, b), implies(name, c, b.negated()), fact(name, a)]


_TEMPLATES: tuple[Callable[[str, Literal, Literal, Literal], list[Premise]], ...] = (
    _modus_ponens,
    _modus_tollens,
    _disjunctive_syllogism,
    _transitivity,
    _unused_rule,
)


def _options(premises: Sequence[Premise], traits: Sequence[str], rng: random.Random) -> tuple[Literal, list[Literal]]:
    """Return the one claim that follows, and all options in random order."""
    claims = [Literal(trait, holds) for trait in traits for holds in (True, False)]
    stated = {premise.any_of[0] for premise in premises if len(premise.any_of) == 1}
    right = rng.choice([claim for claim in claims if claim not in stated and entails(premises, claim)])
    wrong = rng.sample([claim for claim in claims if not entails(premises, claim)], len(LETTERS) - 1)
    options = [right, *wrong]
    rng.shuffle(options)
    return right, options


class Logic:
    """Puzzles with two or three premises and four options, of which exactly one follows."""

    name = "logic"

    def draw(self, rng: random.Random) -> Row:
        """Draw one puzzle."""
        name = rng.choice(NAMES)
        traits = rng.sample(TRAITS, 4)
        a, b, c = (Literal(trait) for trait in traits[:3])
        premises = rng.choice(_TEMPLATES)(name, a, b, c)
        right, options = _options(premises, traits, rng)
        lines = [f"{letter}. {option.says(name)}" for letter, option in zip(LETTERS, options, strict=True)]
        question = " ".join(premise.text for premise in premises) + " What follows?\n" + "\n".join(lines)
        letter = LETTERS[options.index(right)]
        return single_turn(question, letter, reference=letter)

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether `answer` names the right letter and no other."""
        return set(_LETTER.findall(answer)) == {row.reference}
