"""Which of the rows that a model wrote are kept: not the repeated, the empty and the cut ones. Every one is counted."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple


class LeftOut(StrEnum):
    """Why a row is not kept."""

    EMPTY = "empty"
    """It, or one of its turns, says nothing."""
    CUT = "cut"
    """It, or one of its turns, did not end within the tokens that it may have."""
    REPEATED = "repeated"
    """An earlier row says the same."""


class Draft(NamedTuple):
    """A row as the model wrote it."""

    turns: tuple[str, ...]
    """What a user says and what the assistant answers, or one text."""
    num_tokens: int
    """Tokens that were sampled for it."""
    is_cut: bool

    def as_row(self) -> dict[str, Any]:
        """Return the row as a file has it."""
        if len(self.turns) == 1:
            return {"text": self.turns[0]}
        roles = ("user", "assistant")
        return {"messages": [{"role": r, "content": said} for r, said in zip(roles, self.turns, strict=True)]}


class Sifter:
    """Takes drafts in the order of their numbers until there are enough of them, so that ranks do not matter."""

    def __init__(self, rows: int) -> None:
        self._wanted = rows
        self.rows: list[dict[str, Any]] = []
        self.left_out = dict.fromkeys(LeftOut, 0)
        self.num_tokens = 0
        """Sampled for the drafts that were looked at."""
        self._seen: set[tuple[str, ...]] = set()

    @property
    def is_full(self) -> bool:
        """Whether there are as many rows as were wanted."""
        return len(self.rows) >= self._wanted

    def take(self, draft: Draft) -> None:
        """Keep a draft or count it. What comes after the last wanted row is neither."""
        if self.is_full:
            return
        self.num_tokens += draft.num_tokens
        # White space apart: rows that differ in nothing else are learnt as the same.
        said = tuple(" ".join(turn.split()) for turn in draft.turns)
        reason = _reason(draft, said, self._seen)
        if reason is None:
            self._seen.add(said)
            self.rows.append(draft.as_row())
        else:
            self.left_out[reason] += 1

    def told(self) -> str:
        """Say how many were left out, and why."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count) or "none"


def _reason(draft: Draft, said: tuple[str, ...], seen: set[tuple[str, ...]]) -> LeftOut | None:
    if draft.is_cut:
        return LeftOut.CUT
    if not all(said):
        return LeftOut.EMPTY
    return LeftOut.REPEATED if said in seen else None
