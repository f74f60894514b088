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
    """Return one row's conversation; its last question or answer may be empty.

    Prompt and completion are texts, numbers or lists of messages. Raises ValueError, naming ``place``, for what is no
    conversation that can be learnt from.
    """
    if columns.completion is not None:
        prompt, completion = [row[name] for name in columns.prompt], row[columns.completion]
        messages = [*_turns(prompt, "user", place=place), *_turns([completion], "assistant", place=place)]
    else:
        messages = _turns([row[columns.messages or "messages"]], "user", place=place)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise UserError(f"{place}: a conversation must have a prompt and end with the assistant, this one has {roles}")
    return messages


def _turns(cells: Sequence[Any], role: str, *, place: str) -> list[Message]:
    """Return the turns in cells: messages as they are, or one turn of ``role`` made of all texts that are not empty."""
    if any(isinstance(cell, (list, tuple)) for cell in cells):
        if len(cells) > 1:
            raise UserError(f"{place}: several columns cannot be joined where one of them holds messages")
        return [_message(turn, place=place) for turn in cells[0]]
    texts = []
    for cell in cells:
        if cell is not None and not isinstance(cell, (str, int, float)):
            raise UserError(f"{place}: expected a text, a number or a list of messages, got {type(cell).__name__}")
        texts.append("" if cell is None else str(cell))
    return [Message(role=role, content="\n\n".join(text for text in texts if text))]


def _message(turn: Any, *, place: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise UserError(f"{place}: a message must have role and content, got {turn!r:.200}")
    if turn["role"] not in ROLES:
        raise UserError(f"{place}: role {turn['role']!r} is none of {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise UserError(f"{place}: tool calls are not supported; write the call into the content, or remove the row")
    if turn["content"] is not None and not isinstance(turn["content"], str):
        raise UserError(f"{place}: content must be a text, got {type(turn['content']).__name__}")
    return Message(role=turn["role"], content=turn["content"] or "")
