"""Rows of comma- or tab-separated values: a header, then one row after another. Every cell is a text."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

from epi_ds.data.reading.record import Record, Untyped
from epi_ds.errors import UserError

DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons"}


def delimiter_of(header: str) -> str | None:
    """Return what separates most cells of a header; None where nothing separates any."""
    try:
        counts = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in DELIMITERS}
    except csv.Error:
        return None
    best = max(counts, key=lambda delimiter: counts[delimiter])
    return best if counts[best] > 1 else None


def separated_rows(stream: BinaryIO, delimiter: str, place: Callable[[int], str]) -> Iterator[Record]:
    """Yield the rows below the header, by the line they end on. Raises UserError, with the line, for a ragged one."""
    # Texts of a data set are longer than the 128 KiB that the module takes by default.
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next((cells for cells in reader if cells), [])]
        # The index of a table, which pandas writes without a name.
        header = [name or f"column {number}" for number, name in enumerate(header, 1)]
        for name in header:
            if header.count(name) > 1:
                raise UserError(f"{place(1)}: the column name {name!r} stands twice; give each its own")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{place(reader.line_num)}: the row has {len(cells)} cells, the header {len(header)}; put cells in "
                    "double quotes that hold what separates cells, or a line break"
                )
            yield Record(reader.line_num, dict(zip(header, map(Untyped, cells), strict=True)))
    except csv.Error as error:
        raise UserError(f"{place(reader.line_num)}: {error}; write the file with a CSV library, it quotes") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place(reader.line_num + 1)} or soon after: byte 0x{error.object[error.start]:02x} is not UTF-8; save "
            "the file as UTF-8, for example with iconv -f cp1252 -t utf-8"
        ) from error
