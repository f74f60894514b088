"""Read training rows from built-in skills, JSON, JSONL and Parquet files, and the hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from epi_ds.data.conversations import Columns, conversation_of, find_columns
from epi_ds.data.skills import Message, Split, rows
from epi_ds.errors import UserError

logger = logging.getLogger(__name__)

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def skill_conversations(skill: str, *, split: str, size: int, seed: int) -> list[list[Message]]:
    """Generate conversations of a built-in skill."""
    return [list(row.messages) for row in rows(skill, split=Split(split), size=size, seed=seed)]


def is_file_path(path: str) -> bool:
    """Whether a path names a file that can be read here, and not a data set of the hub."""
    return Path(path).suffix in _LOADERS


def table_conversations(
    path: str, columns: Columns, *, split: str = "train", subset: str | None = None, limit: int | None = None
) -> list[list[Message]]:
    """Read conversations from a file, or from the hub where ``path`` is no file.

    path   a ``.json``, ``.jsonl`` or ``.parquet`` file, or a hub id
    split  a split in the notation of ``datasets``, such as ``train[-200:]``; a file is one split called ``train``
    limit  read the first usable rows only

    Rows without a question or an answer, which many data sets have a few of, are left out and counted in a warning.
    Raises ValueError for a file that does not exist, and for rows that are no conversations, by row number.
    """
    table = _load_table(path, split=split, subset=subset)
    found = find_columns(columns, table.column_names, place=path)
    conversations: list[list[Message]] = []
    empty: list[int] = []
    for index, row in enumerate(table):
        if limit is not None and len(conversations) == limit:
            break
        messages = conversation_of(row, found, place=f"{path}, row {index}")
        if messages[-1]["content"] and messages[-2]["content"]:
            conversations.append(messages)
        else:
            empty.append(index)
    if not conversations:
        raise UserError(f"{path} has no row with both a question and an answer; check the columns {found}")
    if empty and os.environ.get("RANK", "0") == "0":
        first = ", ".join(str(index) for index in empty[:5])
        logger.warning("%s: left out %d rows without a question or an answer (rows %s)", path, len(empty), first)
    return conversations


def _load_table(path: str, *, split: str, subset: str | None) -> Any:
    from datasets import load_dataset

    if not is_file_path(path):
        return load_dataset(path, name=subset, split=split)
    if not Path(path).is_file():
        raise UserError(f"there is no data file {path}")
    return load_dataset(_LOADERS[Path(path).suffix], data_files=path, split=split)
