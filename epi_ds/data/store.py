"""Tokenised rows on disk: written once, mapped into memory by every rank that reads them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from epi_ds.data.rendering import Encoded

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ROWS, SUMMARY = "rows.arrow", "summary.json"
NOT_LEARNT = -100
"""The label of a token that the loss is not on, as torch's cross-entropy has it."""
# Rows are looked up one by one: a batch of the file is what one look-up walks over at most.
_BATCH_ROWS = 512
_DIGEST = "rows_sha256"


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

    Of several processes one writes, and the others wait; where it dies, the next one does. A damaged store, as a full
    disk or a power failure leaves it, is written anew.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if folder.exists():
            problem = _problem_of(folder)
            if problem is None:
                yield None
                return
            logger.warning("%s is damaged (%s) and is written anew", folder, problem)
            shutil.rmtree(folder)
        for old in folder.parent.glob(f"{folder.name}.begun-*"):
            # Of a process that died: nobody else writes, or would hold the lock.
            shutil.rmtree(old, ignore_errors=True)
        begun = folder.with_name(f"{folder.name}.begun-{uuid.uuid4().hex}")
        begun.mkdir()
        try:
            yield begun
            try:
                begun.rename(folder)
            except OSError:
                # Where disks have no locks another node may have been faster; its store is as good.
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(begun, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out, on other nodes too; a process that dies lets go of it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): nodes that share it may each prepare the same rows", path, error)
        yield


def seal(folder: Path, summary: Summary) -> None:
    """Write the counts of a store into its folder, and all of it to the disk."""
    rows = folder / ROWS
    values = {**summary._asdict(), _DIGEST: digest_of(rows)}
    (folder / SUMMARY).write_text(json.dumps(values))
    for path in (rows, folder / SUMMARY):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _problem_of(folder: Path) -> str | None:
    """Return what is wrong with a store; None for one that is whole."""
    try:
        digest = json.loads((folder / SUMMARY).read_text())[_DIGEST]
        return None if digest == digest_of(folder / ROWS) else f"{ROWS} has other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def read_summary(folder: Path) -> Summary:
    """Return the counts of a store."""
    values = json.loads((folder / SUMMARY).read_text())
    del values[_DIGEST]
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
