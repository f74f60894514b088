"""One table of conversations: its files, which of its rows are meant, and what came of every one of them."""

from __future__ import annotations

import glob
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.data.cells import text_of
from epi_ds.data.conversation import Conversation
from epi_ds.data.format_search import SAMPLE_ROWS, find_format, unread_columns
from epi_ds.data.formats import Columns, Format, LeftOut, RowFormat
from epi_ds.data.reading.containers import open_rows
from epi_ds.data.reading.record import Record, plain
from epi_ds.errors import UserError

logger = logging.getLogger(__name__)

_SHOWN = 5


class Table(NamedTuple):
    """What to read, and how, as far as the user says it."""

    name: str
    """What messages call it: what the recipe gives."""
    files: tuple[Path, ...]
    """Read one after another, as one table."""
    columns: Columns = Columns()
    format: Format | None = None
    split: str = "train"
    """What the files are, or a part of them such as ``train[:90%]``, counted before anything is left out."""
    where: Mapping[str, Any] = {}
    """The value, or the values, that a column must have."""
    limit: int | None = None
    """How many conversations to read."""
    skip: int = 0
    """How many to leave to others before: they are read as well, and not handed on."""


@dataclass
class Reading:
    """What came of a table's rows, filled while they are read."""

    format: RowFormat | None = None
    containers: list[str] = field(default_factory=list)
    num_read: int = 0
    """Conversations that were handed on."""
    num_skipped: int = 0
    """Those before, which the table leaves to others."""
    left_out: dict[LeftOut, list[str]] = field(default_factory=dict)
    """Places of the rows that were not, by reason; the first few of each."""
    left_out_counts: dict[LeftOut, int] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    """Places of the rows that lose turns behind the assistant's last; the first few."""
    num_cut: int = 0
    telling: list[str] = field(default_factory=list)
    """Columns that are not read and may well say how a row is to be trained on."""
    unread: list[str] = field(default_factory=list)
    """Other columns that are not read."""


class _Part(NamedTuple):
    """Rows ``[start, stop)`` of a table, counted from 0; all of them where there is no end."""

    start: int
    stop: int | None


def files_matching(pattern: str) -> tuple[Path, ...]:
    """Return the files that a pattern matches, in the order of their names, hidden ones left out.

    Raises UserError where there is none.
    """
    found = tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file())
    if not found:
        raise UserError(f"glob: no file matches {pattern!r}; * stands for any name, ** for any folders")
    return found


def read_table(table: Table, reading: Reading) -> Iterator[tuple[str, Conversation]]:
    """Yield the conversations of a table, with their places for messages, and fill ``reading``.

    Rows are read one by one, and none is kept.

    Raises UserError for a file or a row that cannot be read, by name and row, and where no row is left.
    """
    for part in _parts_of(table):
        for place, form, record in _records(table, part, reading):
            if table.limit is not None and reading.num_read == table.limit:
                return
            with _at(place):
                found = form.read(record.cells) if _is_wanted(record, table.where) else LeftOut.FILTERED
            shown = place if len(table.files) > 1 else place.rpartition(", ")[2]
            if isinstance(found, LeftOut):
                reading.left_out_counts[found] = reading.left_out_counts.get(found, 0) + 1
                _note(reading.left_out.setdefault(found, []), shown)
                continue
            if reading.num_skipped < table.skip:
                reading.num_skipped += 1
                continue
            if found.num_cut_turns:
                reading.num_cut += 1
                _note(reading.cut, shown)
            reading.num_read += 1
            yield place, found
    if not reading.num_read:
        reasons = ", ".join(f"{count} {reason}" for reason, count in reading.left_out_counts.items()) or "it is empty"
        raise UserError(f"{table.name} has no row to train on ({reasons}); check the file, columns, split and where")


def _note(places: list[str], place: str) -> None:
    """Keep the first few places."""
    if len(places) < _SHOWN:
        places.append(place)


def _listed(places: Sequence[str], count: int) -> str:
    return ", ".join(places) + (", ..." if count > _SHOWN else "")


def describe(table: Table, reading: Reading) -> Iterator[tuple[int, str]]:
    """Yield what to log of a reading, each with its level: what was found, what was left out, what was not read."""
    if reading.format is None:
        return
    files = f"{len(table.files)} files: {', '.join(map(str, table.files))}; " if len(table.files) > 1 else ""
    containers = ", ".join(dict.fromkeys(reading.containers))
    yield (
        logging.INFO,
        f"{table.name}: {files}{containers}, format {reading.format.format} ({', '.join(reading.format.used)}), "
        f"{reading.num_read} rows" + (f" behind {table.skip} that are held out" if table.skip else ""),
    )
    for reason, count in reading.left_out_counts.items():
        places = _listed(reading.left_out[reason], count)
        level = logging.INFO if reason is LeftOut.FILTERED else logging.WARNING
        yield level, f"{table.name}: left out {count} rows, because of {reason} ({places})"
    if reading.num_cut:
        yield (
            logging.WARNING,
            f"{table.name}: {reading.num_cut} rows go on behind what the assistant says last, and lose these turns "
            f"({_listed(reading.cut, reading.num_cut)})",
        )
    if telling := [name for name in reading.telling if name not in table.where]:
        yield (
            logging.WARNING,
            f"{table.name}: the columns {', '.join(telling)} are not read; where they say which rows to train on, set "
            f"where, for example where: {{{telling[0]}: true}}",
        )
    if reading.unread:
        yield logging.INFO, f"{table.name}: not read are the columns {', '.join(reading.unread)}"


def _is_wanted(record: Record, where: Mapping[str, Any]) -> bool:
    return all(_is_one_of(record.cells.get(column), wanted) for column, wanted in where.items())


def _is_one_of(cell: Any, wanted: Any) -> bool:
    """Whether a cell is a value, or one of several; a table without types has their texts."""
    if isinstance(wanted, (list, tuple)):
        return any(_is_one_of(cell, one) for one in wanted)
    value = plain(cell)
    if isinstance(value, bool) or isinstance(wanted, bool):
        # Tables without types write true, True and TRUE.
        return value is wanted or (isinstance(value, str) and value.lower() == str(wanted).lower())
    if isinstance(value, (int, float)) and isinstance(wanted, (int, float)):
        return value == wanted
    return text_of(cell, "where") == text_of(wanted, "where")


def _records(table: Table, part: _Part, reading: Reading) -> Iterator[tuple[str, RowFormat, Record]]:
    """Yield the rows of a part with their places; the first ones decide how all are read."""
    position = 0
    for path in table.files:
        if part.stop is not None and position >= part.stop:
            return
        with open_rows(path) as rows:
            reading.containers.append(rows.container)
            sample = list(itertools.islice(rows.records, SAMPLE_ROWS)) if reading.format is None else []
            form = reading.format or _find_format(table, reading, [record.cells for record in sample])
            for record in itertools.chain(sample, rows.records):
                if part.stop is not None and position >= part.stop:
                    return
                if position >= part.start:
                    yield rows.place(record.number), form, record
                position += 1


def _find_format(table: Table, reading: Reading, sample: Sequence[Mapping[str, Any]]) -> RowFormat:
    if not sample:
        raise UserError(f"{table.name} is empty: there is no row in it; check how it was written")
    found = find_format(sample, given=table.format, columns=table.columns, place=table.name)
    names = {name for cells in sample for name in cells}
    if missing := [name for name in table.where if name not in names]:
        raise UserError(f"where: {table.name} has no column {', '.join(missing)}; there are {', '.join(sorted(names))}")
    reading.telling, reading.unread = unread_columns(found, sample)
    reading.format = found
    return found


def _parts_of(table: Table) -> list[_Part]:
    """Return what a split in the notation of ``datasets`` means: a table is one split, of which it may name parts."""
    name, bracket, _ = table.split.partition("[")
    if not bracket and "+" not in name:
        return [_Part(0, None)]
    from datasets import ReadInstruction

    num_rows = 0
    for path in table.files:
        with open_rows(path) as rows:
            num_rows += sum(1 for _ in rows.records)
    try:
        found = ReadInstruction.from_spec(table.split).to_absolute({name: num_rows})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"split {table.split!r} of {table.name} ({num_rows} rows): {error}; parts of a split are written "
            f"{name}[:100], {name}[-100:] or {name}[:90%]"
        ) from error
    return [_Part(one.from_ or 0, num_rows if one.to is None else one.to) for one in found]


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
