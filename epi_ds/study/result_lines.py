"""Results: one JSON line a cell, appended as cells end, from which every table and plot is made again."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from epi_ds.errors import UserError, problems_of, summarize
from epi_ds.study.cells import Cell
from epi_ds.study.measures import Cosines, Flips, MaskDrift, Sensitivity
from epi_ds.study.models import Protocol

logger = logging.getLogger(__name__)


class Status(StrEnum):
    """How a cell ended."""

    OK = "ok"
    FAILED = "failed"


class PathPoint(BaseModel):
    """Both scores in the middle of a run: early stopping, free."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    new: float = Field(ge=0, le=1)
    kept: float = Field(ge=0, le=1)


class Result(BaseModel):
    """A line of the results."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    study: str
    protocol: Protocol
    arm: str
    seed: int
    target: str
    status: Status
    new: float | None = Field(None, ge=0, le=1)
    kept: float | None = Field(None, ge=0, le=1)
    new_before: float | None = Field(None, ge=0, le=1)
    kept_before: float | None = Field(None, ge=0, le=1)
    forgetting_rate: float | None = None
    """Mean of (before - after) / before over what the base could (paper eq. 14), a share."""
    backward_transfer: float | None = None
    """Mean over earlier stages of the last score minus that at the stage's own end; of one stage there is none."""
    kl_to_base: float | None = Field(None, ge=0)
    """Of the base's distribution to the trained model's, nats a token of the new task's answers."""
    path: tuple[PathPoint, ...] = ()
    scores: dict[str, tuple[float, ...]] = {}
    """Of every task, before training and at the end of every stage: accuracies, or losses of a token."""
    flips: dict[str, Flips] = {}
    """Of every task, the answers that changed between before training and the run's end. This and the following are
    missing in lines of before they were measured."""
    conflict: dict[str, Cosines] = {}
    """Of every skill that is kept, with the new task; of bases that the study makes."""
    sensitivity: dict[str, Sensitivity] = {}
    """Of every skill that is kept, where the run measures importance while it trains; of bases that the study makes."""
    mask_drift: MaskDrift | None = None
    """Where anything was isolated."""
    seconds: float = Field(ge=0)
    peak_bytes: int | None = None
    """Largest resident memory of the rank."""
    digest: str
    version: str
    error: str | None = None
    """Of a cell that failed, the last lines of its log."""

    @model_validator(mode="after")
    def _has_scores(self) -> Result:
        if self.status is Status.OK and (self.new is None or self.kept is None):
            raise UserError("status is ok, and new or kept is missing")
        return self

    @property
    def cell(self) -> Cell:
        """Which cell it is of."""
        return Cell(self.arm, self.seed, self.target)


def read_results(path: Path) -> list[Result]:
    """Return the lines of a file of results; none where there is none.

    A last line without an end was cut by a kill: it is left out, and told. Raises UserError for any other that is no
    result.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        place = f"line {number} of {path}"
        if not line.endswith("\n"):
            logger.warning("%s was cut, and is left out; its cell runs again", place)
            break
        try:
            found.append(Result.model_validate_json(line))
        except ValidationError as error:
            problems = problems_of(error, Result)
            raise UserError(f"{summarize(problems, place=place)}\nremove the line to have its cell run again") from None
    return found


def check_writable(path: Path) -> None:
    """Raise UserError where no line can be appended: better now than after a cell has run for minutes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"results cannot be written to {path}: {error.strerror}; give another file with --results"
        ) from error


def append_result(path: Path, result: Result) -> None:
    """Append a line; a last one that was cut is removed. Several commands may run parts of one study."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = result.model_dump(mode="json", exclude_defaults=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(_rounded(values), allow_nan=False).encode() + b"\n")


def newest(results: Iterable[Result], digests: Mapping[Cell, str]) -> dict[Cell, Result]:
    """Return the last result of every cell that was run with its present settings.

    digests  of the present settings, see `digest_of`
    """
    return {one.cell: one for one in results if digests.get(one.cell) == one.digest}


def _rounded(value: Any) -> Any:
    """Six digits: scores of 500 rows have three."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
