"""``metrics.jsonl``: one JSON object per line, appended as things happen, cut back on resume.

Every line has ``event``, ``step`` (optimizer steps finished) and ``stage``. Events: ``own_rows`` (what the model wrote
before training, once: `own_rows.file.Written`), ``run`` (a start or a resume, with the rows of every stage's sources,
the settings that it changed and what it ran on), ``step`` (with the mean loss of each source's tokens since the line
before, over all ranks, under ``source_losses``), ``drift`` (a look at the mask under ``refresh_interval: adaptive``),
``refresh``, ``save`` (of a checkpoint: what it took, and whether it failed), ``evaluation`` (every task's score, and
under ``solved`` which of its rows were; they are the same ones every time: `evaluation.scores.Score`), ``summary``
(with the most memory that rank 0 took), ``end`` (everything is on the disk, the exported model too).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_text

FILE = "metrics.jsonl"
BEFORE = "start"
"""Stage name of what happens before the first step."""


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file. A last line torn by a kill is left out."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def evaluation_told(line: Mapping[str, Any]) -> str:
    """Say in a line of text what an ``evaluation`` found."""
    stage = line["stage"]
    when = f"after {stage}" if line["stage_ended"] else f"{stage}, step {line['step']}"
    shown = "  ".join(f"{name} {score['value']:.3f}" for name, score in line["scores"].items())
    return f"{'before training' if stage == BEFORE else when}: {shown}"


def _finite(value: Any) -> Any:
    """Return a value itself, or one with null for the numbers in it that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        found: Any = {key: _finite(part) for key, part in value.items()}
    elif isinstance(value, (list, tuple)):
        found = [_finite(part) for part in value]
    else:
        return value
    same = found.values() if isinstance(found, dict) else found
    parts = value.values() if isinstance(value, dict) else value
    return value if all(one is other for one, other in zip(same, parts, strict=True)) else found


class MetricsWriter:
    """Appends to a metrics file; lines are complete when `write` returns. Raises DiskError where they cannot be."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """``resume_step`` keeps the lines up to that step, which a resumed run does not repeat; None keeps none."""
        kept = [] if resume_step is None else [m for m in read_metrics(path) if m["step"] <= resume_step]
        # Not the lines, of which a long run has many, and large ones.
        self._kept = {(line["event"], line["step"]) for line in kept}
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            # Without a buffer: what could not be written would be tried again when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, event: str, *, step: int, stage: str, **values: Any) -> None:
        """Append one line. Numbers that are not finite, which JSON has not, are null, and told under ``not_finite``."""
        lost = {name: str(value) for name, value in values.items() if _finite(value) is not value}
        line = {
            "event": event,
            "step": step,
            "stage": stage,
            **{name: _finite(value) for name, value in values.items()},
        }
        if lost:
            line["not_finite"] = lost
        rest = (json.dumps(line, allow_nan=False) + "\n").encode()
        with writing(self._path):
            while rest:
                # A disk that is nearly full takes a part, and says so at the next try.
                rest = rest[self._file.write(rest) :]

    def holds(self, event: str, *, step: int) -> bool:
        """Whether an earlier process wrote a line of this event and step, which is kept."""
        return (event, step) in self._kept

    def close(self) -> None:
        """Close the file."""
        self._file.close()
