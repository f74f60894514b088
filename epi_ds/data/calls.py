"""Functions that a model may call, and its calls of them, in the form of chat templates.

Numbers of their arguments are handed on as `exact` leaves them, so that `epi_ds.data.digits` can write them digit by
digit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epi_ds.data.cells import kind_of, list_of, text_of
from epi_ds.data.reading.json_rows import parse
from epi_ds.data.reading.record import exact, plain
from epi_ds.errors import UserError


def functions_of(cell: Any, what: str) -> tuple[dict[str, Any], ...]:
    """Return the schemas of functions: a list, or its JSON; those without the frame that templates expect get it."""
    cell = list_of(cell)
    if cell is None or cell == "":
        return ()
    if not is_functions(cell):
        raise UserError(f"{what} must be a list of functions, as objects or as their JSON, not {kind_of(cell)}")
    found = [exact(one) for one in cell]
    return tuple(one if "function" in one else {"type": "function", "function": one} for one in found)


def is_functions(value: Any) -> bool:
    """Whether a value can be the schemas of functions."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, Mapping) for one in value)


def calls_of(cell: Any, what: str) -> list[dict[str, Any]]:
    """Return calls of functions, one or a list of them; their arguments as an object where they are its JSON.

    Raises UserError for a call without a name, and for arguments that begin as JSON and are none.
    """
    found = list_of(cell)
    return [_call_of(call, what) for call in (found if isinstance(found, list) else [found])]


def _call_of(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise UserError(f"{what}: a call of a function must have a name and arguments, got {str(call)!r:.200}")
    name = text_of(function["name"], f"{what}: the name of a function")
    rest = {key: plain(value) for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    named = {"name": name, "arguments": _arguments_of(function.get("arguments"), f"{what}: arguments of {name}")}
    return {"type": "function", "function": named, **{key: value for key, value in rest.items() if value is not None}}


def _arguments_of(cell: Any, what: str) -> Any:
    if cell is None or cell == "":
        return {}
    if not isinstance(cell, str) or cell.lstrip()[:1] not in ("{", "["):
        # What is no JSON is the text that a function takes as it is.
        return exact(cell)
    try:
        return exact(parse(cell))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} are no JSON ({error}), got {cell!r:.100}; write them as an object") from error
