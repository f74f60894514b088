"""Read training rows from built-in skills, JSON, JSONL and Parquet files, and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epi_ds.data.conversations import Columns, conversation_of, find_columns
from epi_ds.data.skills import Message, Split, rows
from epi_ds.errors import UserError

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def skill_conversations(skill: str, *, split: str, size: int, seed: int) -> list[list[Message]]:
    """Generate conversations of a built-in skill."""
    return [list(row.messages) for row in rows(skill, split=Split(split), size=size, seed=seed)]


def table_conversations(
    path: str, columns: Columns, *, split: str = "train", subset: str | None = None, limit: int | None = None
) -> list[list[Message]]:
    """Read conversations from a file, or from the hub where ``path`` is no file.

    path   a ``.json``, ``.jsonl`` or ``.parquet`` file, or a hub id
    split  a split in the notation of ``datasets``, such as ``train[-200:]``; a file is one split called ``train``
    limit  read the first rows only

    Raises ValueError for a file that does not exist, or rows that cannot be learnt from, by row number.
    """
    table = _load_table(path, split=split, subset=subset)
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    found = find_columns(columns, table.column_names, place=path)
    return [conversation_of(row, found, place=f"{path}, row {index}") for index, row in enumerate(table)]


def _load_table(path: str, *, split: str, subset: str | None) -> Any:
    from datasets import load_dataset

    suffix = Path(path).suffix
    if suffix in _LOADERS:
        if not Path(path).is_file():
            raise UserError(f"there is no data file {path}")
        return load_dataset(_LOADERS[suffix], data_files=path, split=split)
    return load_dataset(path, name=subset, split=split)
