"""Rows of Parquet and Arrow files, which have types of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from epi_ds.data.reading.record import Record
from epi_ds.errors import UserError

if TYPE_CHECKING:
    import pyarrow

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_BATCH = 1024


def parquet_rows(stream: BinaryIO, place: Callable[[int], str]) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    import pyarrow.parquet

    with _told(place):
        file = pyarrow.parquet.ParquetFile(_seekable(stream))
        yield from _rows(file.iter_batches(batch_size=_BATCH))


def arrow_rows(stream: BinaryIO, head: bytes, place: Callable[[int], str]) -> Iterator[Record]:
    """Yield the rows of an Arrow file or stream, such as ``datasets`` keeps in its cache."""
    import pyarrow.ipc

    with _told(place):
        if head.startswith(ARROW_STREAM):
            yield from _rows(pyarrow.ipc.open_stream(stream))
        else:
            file = pyarrow.ipc.open_file(_seekable(stream))
            yield from _rows(file.get_batch(index) for index in range(file.num_record_batches))


def _rows(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for first in range(0, batch.num_rows, _BATCH):
            for cells in batch.slice(first, _BATCH).to_pylist():
                number += 1
                yield Record(number, _without_nulls(cells))


def _without_nulls(cells: dict[str, Any]) -> dict[str, Any]:
    """Return cells without the keys that a table gives to every struct because one of them has it."""
    return {name: _bare(cell) for name, cell in cells.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_bare(part) for part in value]
    return value


def _seekable(stream: BinaryIO) -> Any:
    import pyarrow

    # Their indices stand at the end: what was compressed around them has to be unpacked first.
    return stream if stream.seekable() else pyarrow.BufferReader(stream.read())


@contextmanager
def _told(place: Callable[[int], str]) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place(1)} cannot be read: {error}; the file is cut or damaged, copy it again") from error
