"""Rows for tests: written to files, read from them, and in the form that TRL tokenises by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from epi_ds.data.conversation import Conversation
from epi_ds.data.table import Reading, Table, read_table


def prompts_and_completions(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Dataset:
    """Conversations whose last turn is learnt, as TRL wants them."""
    return Dataset.from_list(
        [{"prompt": list(messages[:-1]), "completion": [messages[-1]]} for messages in conversations]
    )


def read(*files: Path, **settings: Any) -> list[Conversation]:
    """Read files as one table."""
    return read_with(*files, **settings)[0]


def read_with(*files: Path, **settings: Any) -> tuple[list[Conversation], Reading]:
    """Read files as one table; return what came of the rows, too."""
    reading = Reading()
    table = Table(name=str(files[0]), files=files, **settings)
    return [row for _, row in read_table(table, reading)], reading


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
