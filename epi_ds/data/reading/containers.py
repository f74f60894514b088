"""What a file holds, decided by its content: names end in anything, and a wrong guess trains wrong texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from epi_ds.data.reading import arrow_rows, csv_rows, json_rows
from epi_ds.data.reading.compression import Bytes, open_bytes
from epi_ds.data.reading.record import Rows
from epi_ds.errors import UserError

READABLE = "JSON, JSON lines, CSV, TSV, Parquet, Arrow, and these compressed by gzip or zstd"

# Beginnings of files that people name by mistake, with what to do.
_FOREIGN = {
    b"PK\x03\x04": "an archive (zip, or a spreadsheet); unpack it, or save the table as CSV",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8, for example with iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8, for example with iconv -f utf-16 -t utf-8",
    b"SQLite format 3": "a database; export the table as CSV",
    b"BZh": "compressed by bzip2; unpack it, or compress it by gzip or zstd",
    b"\xfd7zXZ": "compressed by xz; unpack it, or compress it by gzip or zstd",
    b"version https://git-lfs": "a pointer to a file that git-lfs has not fetched; run git lfs pull",
}
_HEAD = 1 << 12
# Where nothing separates columns there is one, and only the name says that the file is a table at all.
_SINGLE_COLUMN = {".csv": ",", ".tsv": "\t"}


class _Head(NamedTuple):
    start: bytes
    """The beginning of the file."""
    lines: tuple[bytes, ...]
    """Its first two lines that are not blank."""


@contextmanager
def open_rows(path: Path) -> Iterator[Rows]:
    """Open a file and yield its rows, read one by one.

    Raises UserError, also while rows are read, for a file that cannot be opened, is no table of rows, is not UTF-8, is
    cut, or holds a row that cannot be one; it names the file, the row and the remedy.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name its files with glob, for example glob: {path}/*.jsonl")
    with open_bytes(path) as probe:
        head = _head_of(probe)
    with open_bytes(path) as stream:
        yield _rows_of(path, head, stream)


def _rows_of(path: Path, head: _Head, stream: BinaryIO) -> Rows:
    for magic, what in _FOREIGN.items():
        if head.start.startswith(magic):
            raise UserError(f"{path} is {what}")
    by_row, by_line = _placed(path, "row"), _placed(path, "line")
    if head.start.startswith(arrow_rows.PARQUET):
        return Rows(path, "Parquet", "row", arrow_rows.parquet_rows(stream, by_row))
    if head.start.startswith((arrow_rows.ARROW_FILE, arrow_rows.ARROW_STREAM)):
        return Rows(path, "Arrow", "row", arrow_rows.arrow_rows(stream, head.start, by_row))
    if not head.lines:
        raise UserError(f"{path} is empty: there is no row in it; check how it was written")
    first, *others = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in head.lines)
    if first.startswith(b"["):
        return Rows(path, "JSON list", "row", json_rows.json_list(stream, by_row))
    if first.startswith(b"{"):
        # One object over many lines begins with a line that is none, and no line behind it begins another row.
        if json_rows.holds_whole_object(first.decode(errors="replace")) or any(
            line.startswith(b"{") for line in others
        ):
            return Rows(path, "JSON lines", "line", json_rows.json_lines(stream, by_line))
        return Rows(path, "single JSON object", "row", json_rows.single_object(stream, by_row))
    header = json_rows.decode(first, lambda: by_line(1))
    delimiter = csv_rows.delimiter_of(header) or _SINGLE_COLUMN.get(path.suffix.lower())
    if delimiter is None or not header.replace("\t", "").isprintable():
        raise UserError(f"{path} holds no rows that can be read: it begins with {header!r:.60}; there are {READABLE}")
    return Rows(path, csv_rows.DELIMITERS[delimiter], "line", csv_rows.separated_rows(stream, delimiter, by_line))


def _placed(path: Path, unit: str) -> Callable[[int], str]:
    return lambda number: f"{path}, {unit} {number}"


def _head_of(stream: BinaryIO) -> _Head:
    start = stream.peek(_HEAD)[:_HEAD] if isinstance(stream, Bytes) else b""
    lines: list[bytes] = []
    while len(lines) < 2 and (line := stream.readline()):
        if line.removeprefix(b"\xef\xbb\xbf").strip():
            lines.append(line)
    return _Head(start, tuple(lines))
