"""Tokenised rows on disk: written once, mapped into memory by every rank that reads them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from epi_ds.data.once import Listener, beating
from epi_ds.data.rendering import Encoded

if TYPE_CHECKING:
    from datasets import Dataset

ROWS, SUMMARY = "rows.arrow", "summary.json"
NOT_LEARNT = -100
"""The label of a token that the loss is not on, as torch's cross-entropy has it."""
# Rows are looked up one by one: a batch of the file is what one look-up walks over at most.
_BATCH_ROWS = 512
_LOOK_SECONDS = 0.1


class Summary(NamedTuple):
    """What a store holds and what became of the rows on the way."""

    num_rows: int
    num_tokens: int
    num_learnt: int
    """Tokens that the loss is on."""
    num_cut: int
    """Rows that were longer than ``max_length`` and lost their end (or their beginning)."""
    num_unlearnt: int
    """Rows that were left out because none of their learnt tokens was left."""
    longest: int
    """Tokens of the longest row, before any was cut."""
    lengths: tuple[int, ...]
    """How many rows have fewer than 2, 4, 8, ... tokens, before any was cut; each is counted once."""
    digests: Mapping[str, str]
    """SHA-256 of every file that was read, by its path."""
    told: tuple[tuple[int, str], ...]
    """What to log of the rows, each with its level."""


class Writer:
    """Writes rows and counts them."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        kind = pyarrow.list_(pyarrow.int32())
        self._schema = pyarrow.schema([("input_ids", kind), ("labels", kind)])
        self._file = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)
        self._rows: list[Encoded] = []

    def write(self, row: Encoded) -> None:
        """Add a row."""
        self._rows.append(row)
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the end of the file."""
        self._flush()
        self._stream.close()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow

        labels = [
            [token if learn else NOT_LEARNT for token, learn in zip(row.input_ids, row.learnt, strict=True)]
            for row in self._rows
        ]
        columns = [[row.input_ids for row in self._rows], labels]
        arrays = [pyarrow.array(column, type=field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._stream.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._rows = []


def key_of(values: Mapping[str, Any]) -> str:
    """Return the name of the store that these values decide the content of."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


@contextmanager
def claimed(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to write a store into, which appears under its name when all of it is written; None if it has.

    Of several processes, on several nodes too, one writes; the others wait, and one of them takes over where it died.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, alive = folder.with_suffix(".lock"), folder.with_suffix(".alive")
    listener = Listener(alive)
    while not folder.exists():
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            if listener.is_silent():
                lock.unlink(missing_ok=True)
            time.sleep(_LOOK_SECONDS)
            continue
        begun = folder.with_suffix(f".{os.getpid()}")
        try:
            with beating(alive):
                begun.mkdir()
                yield begun
                begun.rename(folder)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
            alive.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        return
    yield None


def write_summary(folder: Path, summary: Summary) -> None:
    """Write the counts of a store into its folder."""
    (folder / SUMMARY).write_text(json.dumps(summary._asdict()))


def read_summary(folder: Path) -> Summary:
    """Return the counts of a store."""
    values = json.loads((folder / SUMMARY).read_text())
    told = tuple((int(level), str(text)) for level, text in values["told"])
    return Summary(**{**values, "lengths": tuple(values["lengths"]), "told": told})


def open_store(folder: Path) -> Dataset:
    """Return the rows of a store, mapped: a row is read when it is asked for, and no rank holds them all."""
    from datasets import Dataset

    return Dataset.from_file(str(folder / ROWS))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
