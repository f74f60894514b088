"""One row of a file, as it was written there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Number(str):
    """A number of a JSON text, digit by digit: ``2`` is not ``2.0``, and no digit of a long one is lost."""

    __slots__ = ()

    @property
    def value(self) -> int | float:
        """The number itself: an int where it has neither fraction nor exponent."""
        try:
            return int(self)
        except ValueError:
            return float(self)


class Untyped(str):
    """A cell of a table that has texts only: what is no text elsewhere is written as one here."""

    __slots__ = ()


class Record(NamedTuple):
    """The cells of one row, by column."""

    number: int
    """Of the row or line in its file, counted from 1."""
    cells: Mapping[str, Any]


class Rows(NamedTuple):
    """The rows of an open file."""

    path: Path
    container: str
    """What the file turned out to be, for people: ``JSON lines``."""
    unit: str
    """What rows are counted in: ``line`` or ``row``."""
    records: Iterator[Record]

    def place(self, number: int) -> str:
        """Return where a row is, for a message."""
        return f"{self.path}, {self.unit} {number}"


def plain(value: Any) -> Any:
    """Return a cell with numbers for the literals in it, as a template or a comparison wants them."""
    if isinstance(value, Number):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


def exact(value: Any) -> Any:
    """Return a cell with numbers for those literals alone that JSON writes of the number again, digit by digit."""
    if isinstance(value, Number):
        number = value.value
        return number if json.dumps(number) == value else value
    if isinstance(value, Mapping):
        return {key: exact(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(part) for part in value]
    return value
