"""What preparing rows takes: time the first and the second time, and memory of the process that trains on them."""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path
from typing import NamedTuple

from epi_ds.data.apart import prepare_all
from epi_ds.data.preparing import Tokens
from epi_ds.data.rendering import Learnt
from epi_ds.data.skills import load_tokenizer
from epi_ds.data.store import open_store
from epi_ds.data.table import Table

_WORDS = ("the", "model", "learns", "new", "rows", "and", "keeps", "what", "it", "knew", "before", "7", "0.5")
_MAX_LENGTH = 1024
_READ_ROWS = 20_000


class DataRow(NamedTuple):
    """One measurement."""

    rows: int
    file_mb: float
    tokens: int
    processes: int
    first_seconds: float
    """From reading the file to a store that can be trained on, the start of the process that does it included."""
    rows_per_second: float
    second_seconds: float
    """Of a start that finds the store: the file is read for its digest."""
    anonymous_mb: float
    """What the training process has more than before, mapped pages apart, after it read rows in another order."""
    writer_peak_mb: float
    """Most resident memory of any process that prepared them."""


def measure_data(num_rows: int, num_processes: int, folder: Path) -> DataRow:
    """Prepare a file of chats with four turns, twice, and read some of its rows as a trainer does."""
    path = folder / "rows.jsonl"
    _write(path, num_rows)
    tokens = Tokens(
        tokenizer=load_tokenizer(),
        learnt=Learnt.LAST_TURN,
        template=None,
        max_length=_MAX_LENGTH,
        keeps_end=False,
        packing=None,
    )
    table = Table(name=str(path), files=(path,))
    before = _anonymous_bytes()
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        (store,) = prepare_all([table], tokens, cache=folder / "cache", num_processes=num_processes)
        seconds.append(time.perf_counter() - begin)
    rows = open_store(Path(store))
    order = random.Random(0).choices(range(len(rows)), k=min(_READ_ROWS, len(rows)))
    shuffled = rows.select(order)
    read = sum(len(shuffled[index]["input_ids"]) for index in range(len(shuffled)))
    return DataRow(
        rows=num_rows,
        file_mb=path.stat().st_size / 1e6,
        tokens=read * num_rows // len(shuffled),
        processes=num_processes,
        first_seconds=seconds[0],
        rows_per_second=num_rows / seconds[0],
        second_seconds=seconds[1],
        anonymous_mb=(_anonymous_bytes() - before) / 1e6,
        writer_peak_mb=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
    )


def _write(path: Path, num_rows: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            turns = [" ".join(draw.choices(_WORDS, k=draw.randint(10, 60))) for _ in range(4)]
            messages = [
                {"role": "assistant" if index % 2 else "user", "content": f"{number} {text}"}
                for index, text in enumerate(turns)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; this is measured on Linux only")
