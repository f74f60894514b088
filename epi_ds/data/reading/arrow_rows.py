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
        yield from _rows(file.iter_batches(batch_size=_BATCH), place)


def arrow_rows(stream: BinaryIO, head: bytes, place: Callable[[int], str]) -> Iterator[Record]:
    """Yield the rows of an Arrow file or stream, such as ``datasets`` keeps in its cache."""
    import pyarrow.ipc

    with _told(place):
        if head.startswith(ARROW_STREAM):
            yield from _rows(pyarrow.ipc.open_stream(stream), place)
        else:
            file = pyarrow.ipc.open_file(_seekable(stream))
            yield from _rows((file.get_batch(index) for index in range(file.num_record_batches)), place)


def _rows(batches: Iterator[pyarrow.RecordBatch], place: Callable[[int], str]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        # Arrow believes what a file says of where its texts stand, and reads other memory where that is damaged.
        batch.validate(full=True)
        names = batch.schema.names
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{place(1)}: the column name {repeated[0]!r} stands twice; give each its own")
        for first in range(0, batch.num_rows, _BATCH):
            part = batch.slice(first, _BATCH)
            columns = [_column(part, index, place(number + 1)) for index in range(part.num_columns)]
            for index in range(part.num_rows):
                number += 1
                cells = (column[index] for column in columns)
                yield Record(number, dict(zip(names, cells, strict=True)))


def _column(part: pyarrow.RecordBatch, index: int, place: str) -> list[Any]:
    import pyarrow

    from epi_ds.data.reading.arrow_values import values_of

    try:
        return values_of(part.column(index))
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        field, said = part.schema.field(index), _in_a_line(error)
        raise UserError(
            f"{place} or soon after: the column {field.name} ({field.type}) holds what cannot be read ({said}); write "
            "it as texts, or copy the file again if it is damaged"
        ) from error


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
        raise UserError(
            f"{place(1)} cannot be read: {_in_a_line(error)}; the file is cut or damaged, copy it again"
        ) from error


def _in_a_line(error: Exception) -> str:
    """Return what Arrow says, which has several lines where one of its layers asked another."""
    return " ".join(str(error).split())
