"""Which format the rows of a source are in: found by their shape, and never guessed where two are possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epi_ds.data.calls import is_functions
from epi_ds.data.cells import is_turn, list_of
from epi_ds.data.formats import TOOLS, Columns, Format, RowFormat
from epi_ds.errors import UserError

# Of the rows that a format is found by.
SAMPLE_ROWS = 100
# Columns that say something of how a row is to be trained on: whoever has them is told that they are not read.
_TELLING = ("label", "labels", "weight", "train", "chosen", "rejected", "score", "reward")
_PAIRS = {Format.PROMPT_COMPLETION: ("prompt", "completion"), Format.QUESTION_ANSWER: ("question", "answer")}


def find_format(
    sample: Sequence[Mapping[str, Any]], *, given: Format | None, columns: Columns, place: str
) -> RowFormat:
    """Return how the rows of a source are read: as told, else by the shape of the first of them.

    sample   the first rows; a column that none of them has is not there
    given    what the recipe calls the format
    columns  what the recipe names by hand

    Raises UserError where nothing fits, where two formats do, and where named columns are missing.
    """
    names = tuple(dict.fromkeys(name for cells in sample for name in cells))
    if columns.names:
        if missing := [name for name in columns.names if name not in names]:
            raise UserError(f"{place} has no column {', '.join(missing)}; there are {', '.join(names)}")
        by_hand = Format.MESSAGES if columns.messages is not None else Format.PROMPT_COMPLETION
        return _found(by_hand, columns, columns.names, sample)
    candidates = [] if given is None and _are_preferences(names) else _candidates(sample, names)
    if given is not None:
        candidates = [one for one in candidates if one.format is given]
    # A table of LogiQA has a question and an answer too: who explains more of a row is meant.
    candidates = [one for one in candidates if not any(set(one.used) < set(other.used) for other in candidates)]
    if len(candidates) == 1:
        (only,) = candidates
        return _found(only.format, only.columns, only.used, sample)
    if len({one.format for one in candidates}) > 1:
        ways = ", or ".join(f"format: {one.format} ({', '.join(one.used)})" for one in candidates)
        raise UserError(f"{place} can be read in several ways; say which: {ways}")
    if candidates:
        columns_found = ", ".join(one.used[0] for one in candidates)
        raise UserError(
            f"{place} has several columns of conversations ({columns_found}); say which, for example messages: "
            f"{candidates[0].used[0]}"
        )
    raise UserError(f"{place} has the columns {', '.join(names)}, {_hint(sample, names, given)}")


def unread_columns(found: RowFormat, sample: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the columns that are not read: those that would change what is trained, and all others."""
    names = dict.fromkeys(name for cells in sample for name in cells)
    unread = [name for name in names if name not in found.used]
    return [name for name in unread if name in _TELLING], [name for name in unread if name not in _TELLING]


def _found(form: Format, columns: Columns, used: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> RowFormat:
    # Other things are called so too, of which none is a list of objects.
    tools = [name for name in TOOLS if name == "tools" or is_functions(_first(sample, name))]
    present = {name for cells in sample for name in cells}
    extras = [name for name in ("system", *tools) if name in present and name not in used and form is not Format.TEXT]
    return RowFormat(form, columns, (*used, *extras))


def _candidates(sample: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[RowFormat]:
    found = [
        RowFormat(_dialect_of(sample, name), Columns(messages=name), (name,))
        for name in names
        if name not in ("prompt", "completion", "chosen", "rejected") and _is_conversation(_first(sample, name))
    ]
    present = set(names)
    if _is_texts(_first(sample, "data")):
        found.append(RowFormat(Format.ULTRACHAT, Columns(messages="data"), ("data",)))
    if {"instruction", "output"} <= present:
        used = [name for name in ("instruction", "input", "output", "history") if name in present]
        found.append(RowFormat(Format.ALPACA, Columns(), tuple(used)))
    if {"text", "question", "options", "answer"} <= present:
        found.append(RowFormat(Format.LOGIQA, Columns(), ("text", "question", "options", "answer")))
    for form, (prompt, completion) in _PAIRS.items():
        if {prompt, completion} <= present:
            found.append(RowFormat(form, Columns(None, (prompt,), completion), (prompt, completion)))
    if isinstance(_first(sample, "text"), str):
        found.append(RowFormat(Format.TEXT, Columns(), ("text",)))
    return found


def _are_preferences(names: Sequence[str]) -> bool:
    """Whether rows hold two answers: a conversation among their columns is the question to both."""
    return {"chosen", "rejected"} <= set(names)


def _first(sample: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the first cell of a column that says anything."""
    return next((list_of(cells[name]) for cells in sample if cells.get(name) not in (None, "", [])), None)


def _is_conversation(cell: Any) -> bool:
    return isinstance(cell, list) and bool(cell) and all(is_turn(turn) for turn in cell)


def _is_table(cell: Any) -> bool:
    """Whether a cell holds rows: objects that are no turns, not even half of one."""
    turn = {"role", "from", "content", "value"}
    return isinstance(cell, list) and bool(cell) and all(isinstance(one, dict) and not turn & set(one) for one in cell)


def _is_texts(cell: Any) -> bool:
    return isinstance(cell, list) and len(cell) > 1 and all(type(one) is str for one in cell)


def _dialect_of(sample: Sequence[Mapping[str, Any]], name: str) -> Format:
    return Format.SHAREGPT if "from" in _first(sample, name)[0] else Format.MESSAGES


def _hint(sample: Sequence[Mapping[str, Any]], names: Sequence[str], given: Format | None) -> str:
    if given is not None:
        return f"which are not those of format: {given}; remove the key, or name the columns to use"
    conversations = [name for name in names if _is_conversation(_first(sample, name))]
    if _are_preferences(names):
        if "chosen" in conversations:
            return "which are preferences; to train on the answers that were preferred, set messages: chosen"
        prompt = next((name for name in (*conversations, "prompt", "question", "instruction") if name in names), None)
        remedy = f"prompt: {prompt}, completion: chosen" if prompt else "prompt: <column>, completion: chosen"
        return f"which are preferences; to train on the answers that were preferred, set {remedy}"
    nested = [name for name in names if _is_table(_first(sample, name))]
    if len(sample) == 1 and nested:
        return f"of which {nested[0]} holds rows itself; write that list alone into a file"
    # What can be meant are texts of several words.
    texts = [name for name in names if isinstance(cell := _first(sample, name), str) and " " in cell.strip()]
    if len(texts) == 2:
        return (
            f"of which no format is known; name the ones to use, for example prompt: {texts[0]}, completion: {texts[1]}"
        )
    return (
        f"of which no format is known; name the ones to use, as prompt: <column>, completion: <column>, or messages: "
        f"<column>. Known are {', '.join(Format)}"
    )
