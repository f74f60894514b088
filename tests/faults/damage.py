"""What can happen to the files of a checkpoint. Every damage is drawn from a seed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

# Bytes that a reader looks at before it knows how long anything is.
HEADER_BYTES = 64


class Damage(NamedTuple):
    """Something done to one file."""

    fault: str
    """Kind, as the table has it."""
    file: str
    """Path from the tag, or from the run's folder for what lies there."""
    apply: Callable[[Path], None]
    """Given the file's path."""


def files_of(tag: Path) -> list[str]:
    return sorted(str(path.relative_to(tag)) for path in tag.rglob("*") if path.is_file())


def damages(tag: Path, *, rng: random.Random, flips: int, trap: Path) -> Iterator[Damage]:
    """Yield every kind of damage to every file of a tag.

    flips  bits to flip in the header and in the payload of every file, one at a time
    trap   a file that is written if a pickle in place of a file is read
    """
    names = files_of(tag)
    for name in names:
        size = (tag / name).stat().st_size
        yield Damage("file deleted", name, lambda path: path.unlink())
        for keep in (0, rng.randrange(1, size), size - 1):
            yield Damage("file truncated", name, lambda path, keep=keep: path.write_bytes(path.read_bytes()[:keep]))
        for _ in range(flips):
            yield Damage("bit flipped in a header", name, _flip(rng.randrange(min(HEADER_BYTES, size)), rng))
            yield Damage("bit flipped in a payload", name, _flip(rng.randrange(size), rng))
        yield Damage("file of zeros", name, lambda path: path.write_bytes(bytes(path.stat().st_size)))
        yield Damage("bytes appended", name, lambda path: path.write_bytes(path.read_bytes() + b"\x00"))
        yield Damage("pickle with a side effect", name, lambda path: torch.save(Trap(trap), path))
    for name, other in _alike(names):
        beside = Path(other).name
        yield Damage(
            "files of two ranks swapped", name, lambda path, beside=beside: _swap(path, path.with_name(beside))
        )


def _alike(names: list[str]) -> Iterator[tuple[str, str]]:
    """Files of rank 0 and of rank 1 that differ in nothing but that."""
    for name in names:
        for zero, one in (("rank_0_", "rank_1_"), ("rank_00000", "rank_00001")):
            if zero in name and name.replace(zero, one) in names:
                yield name, name.replace(zero, one)


def _swap(one: Path, other: Path) -> None:
    kept = one.with_name("kept")
    shutil.move(one, kept)
    shutil.move(other, one)
    shutil.move(kept, other)


def _flip(at: int, rng: random.Random) -> Callable[[Path], None]:
    bit = 1 << rng.randrange(8)

    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= bit
        path.write_bytes(content)

    return apply


class Trap:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.path, "w")
