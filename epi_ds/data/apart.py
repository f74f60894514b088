"""Preparation in a process of its own, which a rank starts: what reading and tokenising need is given back after it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epi_ds.data.once import as_json, error_of
from epi_ds.data.preparing import Tokens, prepare
from epi_ds.data.sources import SkillRows
from epi_ds.data.table import Table
from epi_ds.errors import RemedyError, UserError
from epi_ds.launch.lost_ranks import die_with_parent

# Below this, in bytes of files or in generated rows, another process would take longer to start than to do it.
_SMALL_BYTES, _SMALL_ROWS = 1 << 23, 20_000


def prepare_all(sources: Sequence[Table | SkillRows], tokens: Tokens, *, cache: Path, num_processes: int) -> list[str]:
    """Return the folders of the sources' stores, see `prepare`. No row of a large source comes into this process."""
    if all(_is_small(source) for source in sources):
        return [str(prepare(source, tokens, cache=cache, num_processes=1).folder) for source in sources]
    with tempfile.TemporaryDirectory(prefix="epi_ds_data_") as folder:
        work, result = Path(folder) / "work", Path(folder) / "result"
        work.write_bytes(pickle.dumps((list(sources), tokens, cache, num_processes)))
        # It is no rank: libraries would look for the others.
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
        ended = subprocess.run(
            [sys.executable, "-m", "epi_ds.data.apart", str(work), str(result)], env=environment, check=False
        )
        if not result.exists():
            raise RemedyError(
                f"the process that prepares the data ended with code {ended.returncode} and left no message; look for "
                "the kernel's out-of-memory killer (dmesg)"
            )
        values = json.loads(result.read_text())
    if "folders" not in values:
        raise error_of(values)
    return list(values["folders"])


def _is_small(source: Table | SkillRows) -> bool:
    if isinstance(source, SkillRows):
        return source.size <= _SMALL_ROWS
    return sum(path.stat().st_size for path in source.files) <= _SMALL_BYTES


def _main(work: Path, result: Path) -> None:
    sources, tokens, cache, num_processes = pickle.loads(work.read_bytes())
    # Nobody wants its rows once the rank is gone.
    die_with_parent(signal.SIGKILL)
    values: dict[str, Any]
    try:
        folders = [prepare(one, tokens, cache=cache, num_processes=num_processes).folder for one in sources]
        values = {"folders": [str(folder) for folder in folders]}
    except (UserError, RemedyError) as error:
        values = as_json(error)
    result.write_text(json.dumps(values))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
