"""The folder of a run: what lies where."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from epi_ds.checkpoint.catalog import Checkpoint, checkpoints_in
from epi_ds.errors import RemedyError, UserError
from epi_ds.own_rows.file import record_of
from epi_ds.train.metrics import FILE as METRICS_FILE


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
    def has_export(self) -> bool:
        """Whether the final model, or adapter, was written to its end: its tokenizer is what is written last."""
        configured = any((self.export / name).is_file() for name in ("config.json", "adapter_config.json"))
        return configured and (self.export / "tokenizer_config.json").is_file()

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report.html"

    @property
    def recipe(self) -> Path:
        """The recipe as it was run."""
        return self.root / "recipe.json"

    @property
    def own_rows(self) -> Path:
        """Rows that the model wrote itself before training."""
        return self.root / "own_rows.jsonl"

    def prepare(self) -> None:
        """Make the folder, if it is not there.

        Raises UserError where a file is in its place, and RemedyError where nothing can be written there.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"output {self.root} cannot be a folder, a file is in its place ({error}); give another"
            ) from error
        except OSError as error:
            raise RemedyError(
                f"output {self.root} cannot be written ({error}); make room or get access, or give another"
            ) from error

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that lies in the folder. Raises what `prepare` raises."""
        self.prepare()
        for file in (self.metrics, self.report, self.recipe, self.own_rows, record_of(self.own_rows)):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.export):
            shutil.rmtree(folder, ignore_errors=True)

    def complete_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints that were saved to their end, by step. Their files are not read."""
        return [found for found in checkpoints_in(self.checkpoints) if found.problem is None]
