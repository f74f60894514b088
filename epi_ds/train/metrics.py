"""``metrics.jsonl``: one JSON object per line, appended as things happen, cut back on resume.

Every line has ``event``, ``step`` (optimizer steps finished) and ``stage``. Events: ``run`` (a start or a resume, with
the settings that it changed), ``step``, ``drift`` (a look at the mask under ``refresh_interval: adaptive``),
``refresh``, ``evaluation``, ``summary``, ``end`` (everything is on the disk, the exported model included).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file. A last line torn by a kill is left out."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


class MetricsWriter:
    """Appends to a metrics file; lines are complete on disk when `write` returns."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """``resume_step`` keeps the lines up to that step, which a resumed run does not repeat; None keeps none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [m for m in read_metrics(path) if m["step"] <= resume_step]
        # Not the lines, of which a long run has many, and large ones.
        self._kept = {(line["event"], line["step"]) for line in kept}
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)

    def write(self, event: str, *, step: int, stage: str, **values: Any) -> None:
        """Append one line."""
        self._file.write(json.dumps({"event": event, "step": step, "stage": stage, **values}) + "\n")

    def holds(self, event: str, *, step: int) -> bool:
        """Whether an earlier process wrote a line of this event and step, which is kept."""
        return (event, step) in self._kept

    def close(self) -> None:
        """Close the file."""
        self._file.close()
