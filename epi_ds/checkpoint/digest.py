"""Checksums of files: XXH3, 128 bits, which is faster than the memory that files are read into.

It finds every accident. It proves nothing about who made a file: whoever can change one can change the checksum beside
it. See [Note: trust] in run.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

ALGORITHM = "xxh3_128"
_BLOCK_BYTES = 1 << 20
# Reading is what takes the time, and the hash releases the interpreter while it runs.
_THREADS = 4


class FileRecord(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    xxh3_128: str


def record_of(path: Path) -> FileRecord:
    """Read a file once and return its record."""
    digest = xxhash.xxh3_128()
    block = bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
            num_bytes += count
    return FileRecord(num_bytes=num_bytes, xxh3_128=digest.hexdigest())


def text_digest(text: str) -> str:
    """Return the checksum of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def records_of(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Return the records of files by their paths relative to ``folder``. Read in parallel."""
    chosen = list(names)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        found = pool.map(lambda name: record_of(folder / name), chosen)
        return dict(zip(chosen, found, strict=True))


def problems_of_files(folder: Path, expected: Mapping[str, FileRecord]) -> list[str]:
    """Return what is wrong with files, one sentence each, the same for every reader. Read in parallel.

    expected  by path relative to ``folder``
    """
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        found = pool.map(lambda item: _problem(folder / item[0], item[1]), sorted(expected.items()))
        return [problem for problem in found if problem is not None]


def _problem(path: Path, expected: FileRecord) -> str | None:
    try:
        num_bytes = os.stat(path).st_size
        if num_bytes != expected.num_bytes:
            return f"{path} has {num_bytes} bytes, and was saved with {expected.num_bytes}"
        if record_of(path) != expected:
            return f"{path} is damaged: its checksum ({ALGORITHM}) is not the saved one"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None
