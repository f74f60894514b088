"""What single cells say. A cell that cannot be what is wanted is told, never converted."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Mapping
from typing import Any

from epi_ds.data.reading.json_rows import parse
from epi_ds.data.reading.record import Number, Untyped
from epi_ds.errors import UserError

ROLE_KEYS = ("role", "from")
"""Under which a turn says who speaks, in the dialects that people have."""


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
    raise UserError(f"{what} must be a text or a number, not {kind_of(cell)}")


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


def is_turn(value: Any) -> bool:
    """Whether a value is a turn of one of the dialects: it says who speaks."""
    return isinstance(value, Mapping) and any(key in value for key in ROLE_KEYS)


def _check_surrogates(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        raise UserError(
            f"{what} holds half of a character at position {error.start + 1} (\\u{found:04x}, a lone surrogate), which "
            "no tokenizer takes; write the row again from its source"
        ) from error


def kind_of(cell: Any) -> str:
    """Return what a cell is, for a message."""
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
