"""One form for all training data: a conversation whose last turn the model is to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from epi_ds.data.skills import Message
from epi_ds.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


class Columns(NamedTuple):
    """Where a table keeps its conversations: one column of messages, or prompts and completions."""

    messages: str | None = None
    prompt: tuple[str, ...] = ()
    completion: str | None = None


def find_columns(columns: Columns, available: Sequence[str], *, place: str) -> Columns:
    """Return the columns to read: the given ones, or ``messages``, or ``prompt`` and ``completion`` where they exist.

    Raises ValueError naming what is missing and what there is.
    """
    if columns.messages is None and not columns.prompt:
        if "messages" in available:
            return Columns(messages="messages")
        if "prompt" in available and "completion" in available:
            return Columns(prompt=("prompt",), completion="completion")
        raise UserError(
            f"{place} has the columns {', '.join(available)}: name the ones to use, for example prompt: "
            f"{available[0]}, completion: {available[-1]}"
        )
    wanted = [columns.messages, *columns.prompt, columns.completion]
    missing = [name for name in wanted if name is not None and name not in available]
    if missing:
        raise UserError(f"{place} has no column {', '.join(missing)}; there are {', '.join(available)}")
    return columns


def conversation_of(row: Mapping[str, Any], columns: Columns, *, place: str) -> list[Message]:
    """Return one row's conversation. Raises ValueError, naming ``place``, for one that cannot be learnt from."""
    if columns.completion is not None:
        prompt = "\n\n".join(str(row[name]) for name in columns.prompt if row[name])
        messages = [
            Message(role="user", content=prompt),
            Message(role="assistant", content=str(row[columns.completion] or "")),
        ]
    else:
        turns = row[columns.messages or "messages"]
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in turns or ()]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise UserError(f"{place}: a conversation must have a prompt and end with the assistant, this one has {roles}")
    for message in messages:
        if message["role"] not in ROLES:
            raise UserError(f"{place}: role {message['role']!r} is none of {', '.join(ROLES)}")
    if not messages[-1]["content"] or not messages[-2]["content"]:
        raise UserError(f"{place}: the last question or its answer is empty; remove the row")
    return messages
