"""What a task family is, and how its rows are drawn and split into training and test rows."""

import hashlib
import json
import random
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypedDict

from epi_ds.errors import UserError

TEST_SHARE = 5
"""One prompt in this many is a test prompt."""

PATIENCE = 2000
"""Draws in a row that may bring no new test row before the test rows count as used up."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Row(NamedTuple):
    """A conversation that ends with the assistant's reference answer."""

    messages: tuple[Message, ...]
    """All turns; the last one is the assistant's reference answer."""
    reference: str
    """What ``Skill.check`` compares an answer with; its form is up to the skill."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns but the reference answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The reference answer, as the assistant should write it."""
        return self.messages[-1]["content"]


class Skill(Protocol):
    """A family of generated tasks whose answers a program can check."""

    @property
    def name(self) -> str:
        """The name users select the skill by."""

    def draw(self, rng: random.Random) -> Row:
        """Draw one row; all of its randomness comes from ``rng``."""

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether ``answer``, a model's text for the last assistant turn, solves ``row``."""


class Split(Enum):
    """Which rows to draw: a prompt belongs to exactly one split."""

    TRAIN = "train"
    TEST = "test"


def single_turn(question: str, answer: str, *, reference: str) -> Row:
    """Build a row with one user turn and one assistant turn."""
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Row(messages=messages, reference=reference)


def split_of(row: Row) -> Split:
    """Return the split a row belongs to, which its prompt alone decides.

    It is the same on every machine, and whatever size and seed the row was drawn with.
    """
    turns = [[message["role"], message["content"]] for message in row.prompt]
    digest = hashlib.sha256(json.dumps(turns).encode()).digest()
    return Split.TEST if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else Split.TRAIN


def draw_rows(skill: Skill, *, split: Split, size: int, seed: int) -> list[Row]:
    """Draw rows of one split of a skill.

    size  how many rows to return, exactly
    seed  selects the sequence of draws

    The same arguments give the same rows on every machine, and a larger size extends a smaller one. Training rows may
    repeat; test rows repeat only once no new one turns up any more. Raises ValueError if ``size`` is negative, or the
    skill has no row in the split.
    """
    if size < 0:
        raise UserError(f"size={size} for skill {skill.name!r}: must be 0 or more; pass the number of rows")
    rng = random.Random(f"{skill.name}:{seed}")
    drawn: list[Row] = []
    seen: set[str] = set()
    may_repeat = split is Split.TRAIN
    barren = 0
    while len(drawn) < size:
        row = skill.draw(rng)
        prompt = json.dumps(row.prompt)
        if split_of(row) is split and (may_repeat or prompt not in seen):
            drawn.append(row)
            seen.add(prompt)
            barren = 0
            continue
        barren += 1
        if barren >= PATIENCE:
            if not drawn:
                raise UserError(
                    f"skill {skill.name!r} gave no {split.value} row in {PATIENCE} draws: a skill needs rows in "
                    "both splits; give its `draw` more distinct prompts"
                )
            may_repeat = True
    return drawn


def row_to_dict(row: Row) -> dict[str, Any]:
    """Return a row as plain lists, dictionaries and strings, as JSON and ``datasets.Dataset`` keep it."""
    return {"messages": [dict(message) for message in row.messages], "reference": row.reference}


def row_from_dict(record: Mapping[str, Any]) -> Row:
    """Rebuild a row from what ``row_to_dict`` returned; other keys are ignored.

    Raises ValueError if ``messages`` or ``reference`` is missing.
    """
    missing = [key for key in ("messages", "reference") if key not in record]
    if missing:
        raise UserError(
            f"record has keys {sorted(record)} but lacks {missing}: a skill row needs `messages` and "
            "`reference`; pass what `row_to_dict` returned"
        )
    messages = tuple(Message(role=turn["role"], content=turn["content"]) for turn in record["messages"])
    return Row(messages=messages, reference=record["reference"])
