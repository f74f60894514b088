"""Where training rows come from: built-in skills, files, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from epi_ds.data.conversation import Conversation, conversation_of
from epi_ds.data.hub import files_of, is_hub_id
from epi_ds.data.skills import Split, rows
from epi_ds.errors import UserError


class SkillRows(NamedTuple):
    """Rows of a built-in skill."""

    skill: str
    split: str
    size: int
    seed: int


def skill_conversations(source: SkillRows) -> Iterator[Conversation]:
    """Generate the rows of a skill, as conversations."""
    drawn = rows(source.skill, split=Split(source.split), size=source.size, seed=source.seed)
    return (conversation_of(row.messages) for row in drawn)


def is_local(path: str) -> bool:
    """Whether a path is of this machine, and not the id of a data set of the hub. What exists here always is."""
    return Path(path).exists() or not is_hub_id(path) or Path(path).suffix.lower() in _FILE_ENDINGS


def find_files(path: str, *, subset: str | None = None, split: str = "train") -> tuple[Path, ...]:
    """Return the file that a path names, or the files of a split of the hub's data set of that name.

    Raises UserError for a file that does not exist, and what `files_of` raises.
    """
    if not is_local(path):
        return files_of(path, subset=subset, split=split)
    if not Path(path).exists():
        raise UserError(f"there is no data file {path}")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name its files with glob, for example glob: {path}/*.jsonl")
    if not Path(path).is_file():
        raise UserError(f"{path} is no file that can be read twice; write what it gives to a file")
    check_split(split, path)
    return (Path(path),)


def check_split(split: str, name: str) -> None:
    """Raise UserError for a split that files do not have."""
    if split.partition("[")[0] != "train":
        raise UserError(f"split {split!r}: {name} is one split called train; give the files of the other split")


# Of names that have the form of an id, these are meant for files.
_FILE_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst")
