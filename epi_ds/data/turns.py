"""Turns of conversations, of every dialect, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from epi_ds.data.calls import calls_of
from epi_ds.data.cells import ROLE_KEYS, is_turn, kind_of, list_of, text_of
from epi_ds.data.conversation import ROLES
from epi_ds.data.reading.record import plain
from epi_ds.errors import UserError, nearest

# What speakers are called in the formats that people have.
_SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "prompter": "user",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")
_CONTENT_KEYS = ("content", "value")
_CALL_KEYS = ("tool_calls", "function_call")
_TRAINED_KEYS = ("weight", "train")


def messages_of(cell: Any, what: str) -> list[dict[str, Any]]:
    """Return turns, of either dialect (``role`` and ``content``, ``from`` and ``value``), as chat templates take them.

    Raises UserError for a turn that lacks one of them, for a speaker nobody knows, and for what is no list of turns.
    """
    cell = list_of(cell)
    if isinstance(cell, Mapping):
        cell = [cell]
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise UserError(f"{what} must be a list of turns, not {kind_of(cell)}")
    return [_message(turn, f"{what}, turn {number}") for number, turn in enumerate(cell, 1)]


def trained_of(turn: Mapping[str, Any], what: str) -> bool | None:
    """Return whether a turn says that it is to be learnt (``weight`` 1 or 0, ``train`` true or false); None if not."""
    said = [plain(turn[key]) for key in _TRAINED_KEYS if turn.get(key) is not None]
    if not said:
        return None
    if any(value not in (0, 1) for value in said) or len({bool(value) for value in said}) > 1:
        raise UserError(f"{what}: weight must be 0 or 1, and train false or true, got {said}; shares are not supported")
    return bool(said[0])


def _message(turn: Any, what: str) -> dict[str, Any]:
    if not is_turn(turn):
        raise UserError(
            f"{what} must have role and content (or from and value), got {json.dumps(turn, default=str)[:200]}"
        )
    role_key = next(key for key in ROLE_KEYS if key in turn)
    content_key = next((key for key in _CONTENT_KEYS if key in turn), "content")
    speaker = str(turn[role_key]).lower()
    others = {
        key: plain(value)
        for key, value in turn.items()
        if key not in (role_key, content_key, *_CALL_KEYS, *_TRAINED_KEYS) and value not in (None, "")
    }
    if speaker in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": calls_of(turn.get(content_key), what), **others}
    if speaker not in _SPEAKERS:
        raise UserError(
            f"{what}: the role {speaker!r} is not known{nearest(speaker, _SPEAKERS)}; there are {', '.join(_SPEAKERS)}"
        )
    message = {"role": _SPEAKERS[speaker], "content": _content(turn.get(content_key), what), **others}
    if calls := _calls_in(turn, message["role"], what):
        message["tool_calls"] = calls
    return message


def _calls_in(turn: Mapping[str, Any], role: str, what: str) -> list[dict[str, Any]]:
    """Return the calls beside what a turn says. One that is called ``function_call``, as OpenAI did, is one of them."""
    said = [key for key in _CALL_KEYS if turn.get(key)]
    if said and role != "assistant":
        raise UserError(f"{what}: {said[0]} is the assistant's, and this is a turn of the role {role}; remove the key")
    if len(said) > 1:
        raise UserError(f"{what}: it has {' and '.join(said)}, which say the same in two ways; leave one of them")
    return calls_of(turn[said[0]], what) if said else []


def _content(cell: Any, what: str) -> str:
    """Return what a turn says; texts in parts are joined. Raises UserError for a picture, a sound, a film."""
    if not isinstance(cell, list):
        return text_of(cell, f"{what}: content")
    texts = []
    for part in cell:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or "text" not in part:
            raise UserError(f"{what}: content of type {kind or kind_of(part)} is not supported, only text is")
        texts.append(text_of(part["text"], f"{what}: content"))
    return "".join(texts)
