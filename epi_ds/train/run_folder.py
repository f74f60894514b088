"""The folder of a run: what lies where, and which of its checkpoints a run can resume from.

A trainer's checkpoint is complete only after every rank has written its part, random states and trainer state included.
``run.json`` is put into it after that, by rename: a ``checkpoint-N`` without one is not resumed from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epi_ds.train.metrics import FILE as METRICS_FILE

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_MARKER = "run.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths inside the folder of a run."""

    root: Path

    @property
    def metrics(self) -> Path:
        """Everything that was measured, a JSON object per line."""
        return self.root / METRICS_FILE

    @property
    def checkpoints(self) -> Path:
        """The trainer's checkpoints."""
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        """The final model in Hugging Face format."""
        return self.root / "export"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report.html"

    @property
    def recipe(self) -> Path:
        """The recipe as it was run."""
        return self.root / "recipe.json"

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that lies in the folder."""
        for file in (self.metrics, self.report, self.recipe):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.export):
            shutil.rmtree(folder, ignore_errors=True)

    def rotate(self, limit: int) -> None:
        """Remove all checkpoints but the newest ``limit`` complete ones."""
        kept = {checkpoint.path for checkpoint in self.committed_checkpoints()[-limit:]}
        for folder in self.checkpoints.glob("checkpoint-*"):
            if folder not in kept:
                # The marker first: what is half removed must not look complete.
                (folder / _MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder)

    def committed_checkpoints(self) -> list[Checkpoint]:
        """Return the complete checkpoints, by step."""
        found = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            match = _CHECKPOINT.search(folder.name)
            marker = folder / _MARKER
            if match and marker.is_file():
                found.append(Checkpoint(folder, int(match.group(1)), json.loads(marker.read_text())))
        return sorted(found, key=lambda checkpoint: checkpoint.step)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    marker: dict[str, Any]


def write_atomically(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that the file is either whole or absent, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def commit(folder: Path, marker: dict[str, Any]) -> None:
    """Declare a checkpoint complete. Call on one rank, after all ranks have finished writing."""
    write_atomically(folder / _MARKER, marker)
