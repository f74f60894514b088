"""What single cells say: texts, turns, functions. A cell that cannot be what is wanted is told, never converted."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Mapping, Sequence
from typing import Any

from epi_ds.data.conversation import ROLES
from epi_ds.data.reading.json_rows import parse
from epi_ds.data.reading.record import Number, Untyped, plain
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
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_TRAINED_KEYS = ("weight", "train")


def text_of(cell: Any, what: str) -> str:
    """Return a text as it is written, a number by its digits, JSON's ``true`` and ``false``; empty for None.

    ``what`` names the cell in the message. Raises UserError for what is no text.
    """
    # A table writes NaN where nothing is.
    if cell is None or (isinstance(cell, (Number, float)) and str(cell).lower() == "nan"):
        return ""
    if isinstance(cell, str):
        if not cell.isascii():
            _check_surrogates(cell, what)
        return str(cell)
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, (int, float, decimal.Decimal)):
        return str(cell)
    if isinstance(cell, (datetime.date, datetime.time)):
        return cell.isoformat()
    raise UserError(f"{what} must be a text or a number, not {_kind(cell)}")


def value_of(cell: Any) -> Any:
    """Return what a cell holds that may be a text: of a table with texts only, the value of the JSON in it."""
    if not isinstance(cell, Untyped):
        return cell
    value = list_of(cell)
    # An answer may be JSON: only turns are no text.
    holds_turns = is_turn(value) or (isinstance(value, list) and bool(value) and all(is_turn(one) for one in value))
    return value if holds_turns else cell


def list_of(cell: Any) -> Any:
    """Return the value of a cell that can be no text: where it is one, of the JSON in it; if there is none, itself."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            return parse(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def messages_of(cell: Any, what: str) -> list[dict[str, Any]]:
    """Return turns, of either dialect (``role`` and ``content``, ``from`` and ``value``), as chat templates take them.

    Raises UserError for a turn that lacks one of them, for a speaker nobody knows, and for what is no list of turns.
    """
    cell = list_of(cell)
    if isinstance(cell, Mapping):
        cell = [cell]
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise UserError(f"{what} must be a list of turns, not {_kind(cell)}")
    return [_message(turn, f"{what}, turn {number}") for number, turn in enumerate(cell, 1)]


def is_turn(value: Any) -> bool:
    """Whether a value is a turn of one of the dialects: it says who speaks."""
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS)


def functions_of(cell: Any, what: str) -> tuple[dict[str, Any], ...]:
    """Return the schemas of functions: a list, or its JSON; those without the frame that templates expect get it."""
    cell = list_of(cell)
    if cell is None or cell == "":
        return ()
    if not isinstance(cell, Sequence) or isinstance(cell, str) or not all(isinstance(one, Mapping) for one in cell):
        raise UserError(f"{what} must be a list of functions, as objects or as their JSON, not {_kind(cell)}")
    found = [plain(one) for one in cell]
    return tuple(one if "function" in one else {"type": "function", "function": one} for one in found)


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
    role_key = next(key for key in _ROLE_KEYS if key in turn)
    content_key = next((key for key in _CONTENT_KEYS if key in turn), "content")
    speaker = str(turn[role_key]).lower()
    others = {
        key: plain(value)
        for key, value in turn.items()
        if key not in (role_key, content_key, "tool_calls", *_TRAINED_KEYS) and value not in (None, "")
    }
    if speaker in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls_of(turn.get(content_key), what), **others}
    if speaker not in _SPEAKERS:
        raise UserError(
            f"{what}: the role {speaker!r} is not known{nearest(speaker, _SPEAKERS)}; there are {', '.join(_SPEAKERS)}"
        )
    message = {"role": _SPEAKERS[speaker], "content": _content(turn.get(content_key), what), **others}
    if turn.get("tool_calls"):
        message["tool_calls"] = _calls_of(turn["tool_calls"], what)
    return message


def _content(cell: Any, what: str) -> str:
    """Return what a turn says; texts in parts are joined. Raises UserError for a picture, a sound, a film."""
    if not isinstance(cell, list):
        return text_of(cell, f"{what}: content")
    texts = []
    for part in cell:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or "text" not in part:
            raise UserError(f"{what}: content of type {kind or _kind(part)} is not supported, only text is")
        texts.append(text_of(part["text"], f"{what}: content"))
    return "".join(texts)


def _calls_of(cell: Any, what: str) -> list[dict[str, Any]]:
    """Return calls of functions in the form of chat templates, their arguments as an object."""
    found = list_of(cell)
    calls = []
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise UserError(f"{what}: a call of a function must have a name and arguments, got {str(call)!r:.200}")
        arguments = plain(list_of(function.get("arguments", {})))
        rest = {
            key: plain(value) for key, value in call.items() if key not in ("function", "name", "arguments", "type")
        }
        named = {"name": str(function["name"]), "arguments": arguments}
        calls.append({"type": "function", "function": named, **{k: v for k, v in rest.items() if v is not None}})
    return calls


def _check_surrogates(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        raise UserError(
            f"{what} holds half of a character at position {error.start + 1} (\\u{found:04x}, a lone surrogate), which "
            "no tokenizer takes; write the row again from its source"
        ) from error


def _kind(cell: Any) -> str:
    if isinstance(cell, Number):
        return "a number"
    names = {
        str: "a text",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
        bool: "true or false",
        type(None): "nothing",
    }
    return names.get(type(cell), type(cell).__name__)
