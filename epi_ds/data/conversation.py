"""One form for all training data: a conversation, or a document without turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""A turn as chat templates take it: ``role`` and ``content``, and what else its template knows."""

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one row says, whatever format it came in."""

    messages: tuple[Message, ...] = ()
    """All turns; the last one is the assistant's."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the model may call."""
    trained: tuple[bool | None, ...] = ()
    """For every turn whether the row asks for it to be learnt; None, or an empty tuple, where it does not say."""
    num_cut_turns: int = 0
    """Turns that the row has behind these, which nothing of the assistant follows."""
    text: str | None = None
    """A document instead of turns, all of which is learnt."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns but the last."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the assistant says last."""
        return str(self.messages[-1]["content"])


def conversation_of(messages: Sequence[Message]) -> Conversation:
    """Return a conversation of plain turns, such as a built-in skill generates."""
    return Conversation(messages=tuple(messages))
