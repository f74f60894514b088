"""``epi/manifest.json``: written last, by rename. A folder without one is no checkpoint.

It names every file below the folder with its size and checksum, and says what they were made with; a digest of its
own text is in it too, so that a flipped bit does not become another step or another ratio. The folder is a tag of
DeepSpeed's, or a trainer's ``checkpoint-N`` with a tag in it.

[Note: releases] A key that has a default here may be missing: an earlier release knew nothing of it. A key that this
release does not know may change what the others mean, so it is refused, with the release that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticKnownError

from epi_ds.checkpoint.digest import FileRecord, text_digest
from epi_ds.checkpoint.durable import sync_folder, write_json
from epi_ds.errors import CheckpointError, problems_of, summarize, unknown_keys
from epi_ds.isolation.counters import Counters

FOLDER = "epi"
FILE = "manifest.json"
# Where it lies, from the folder that it vouches for.
PATH = f"{FOLDER}/{FILE}"
FORMAT_VERSION = 4
# Under which the shards hold what an anchor pulls towards.
ANCHOR_STATE = "anchor"

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Kind(StrEnum):
    """What a manifest vouches for."""

    TAG = "tag"
    """The folder of one `save_checkpoint`."""
    TRAINER = "trainer"
    """A trainer's folder, with a tag inside."""


class Batch(BaseModel):
    """Rows of an optimizer step."""

    model_config = _FROZEN

    micro_batch: int
    accumulation: int
    world_size: int

    @property
    def rows(self) -> int:
        """The number over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size

    def __str__(self) -> str:
        return (
            f"{self.rows} (micro-batch {self.micro_batch} x accumulation {self.accumulation} x {self.world_size} ranks)"
        )


class SavedParameter(BaseModel):
    """A trainable parameter, whole."""

    model_config = _FROZEN

    name: str
    shape: tuple[int, ...]


class SavedSubGroup(BaseModel):
    """What one of ZeRO-3's sub-groups consisted of, in order."""

    model_config = _FROZEN

    param_group: int
    parameters: tuple[SavedParameter, ...]


class SavedOptimizer(BaseModel):
    """What must be the same for the optimizer's states to go on, and what a load overwrites."""

    model_config = _FROZEN

    name: str
    """Of its class."""
    algorithm: str
    """The same for classes whose states mean the same."""
    state_keys: tuple[str, ...]
    """Keys of the states of all sub-groups, sorted; empty before there are any."""
    groups: tuple[dict[str, Any], ...]
    """Hyper-parameters of every parameter group."""

    def __str__(self) -> str:
        states = f", states {', '.join(self.state_keys)}" if self.state_keys else ""
        return f"{self.name} ({self.algorithm}{states})" if self.algorithm != self.name or states else self.name


class SavedAnchor(BaseModel):
    """Where an anchor stands; what it pulls towards lies in the shards."""

    model_config = _FROZEN

    to: str
    """`AnchorConfig.to`."""
    is_taken: bool
    """Whether the shards hold what it pulls towards; not before the first step of a run or a stage."""
    folder_files: dict[str, FileRecord] | None = None
    """Where it lies in a folder: that folder's files, by name. The tag has no copy of them."""
    totals: tuple[float, ...] | None = None
    """Sums of the learning rates that are planned for the stage, by parameter group; None where none were."""
    square_sum: float = 0.0
    """Of `GradientScale`."""
    weight: float = 0.0
    """Of `GradientScale`."""
    stage: int | None = None
    """How many stages had ended; None where an earlier release saved."""
    settings: dict[str, Any] | None = None
    """How it pulled, by the names of `AnchorConfig`; None where an earlier release saved."""


class EngineState(BaseModel):
    """What the engine keeps beside the optimizer's state and the isolation's, and readers without an engine need."""

    model_config = _FROZEN

    clipping: tuple[dict[str, float], ...] = ()
    """`ClippingAverage.to_dict` of every parameter group; empty where none was kept, and they begin anew."""
    swapped: dict[str, str] = {}
    """Names of the files with the weights of sub-groups that NVMe offload had swapped out, by sub-group."""
    anchor: SavedAnchor | None = None
    """None where nothing was pulled."""


class Isolation(BaseModel):
    """What the shards do not say of the isolation of a tag."""

    model_config = _FROZEN

    config: dict[str, Any]
    counters: dict[str, int | float]
    states: tuple[str, ...]
    """Names of what is stored per entry beside the masks."""
    threshold_codes: dict[str, int] | None = None
    """Threshold code of each layer; None before the first refresh."""
    last_row_codes: list[int] | None = None
    """Where the last search ended (`Thresholds.row_codes`); what an adaptive run decides next depends on it."""
    extra: EngineState = EngineState()

    @field_validator("counters")
    @classmethod
    def _counters_are_known(cls, counters: dict[str, int | float]) -> dict[str, int | float]:
        if not counters.keys() <= {known.name for known in fields(Counters)}:
            raise PydanticKnownError("extra_forbidden")
        if counters.get("observations", 0) and not counters.get("importance_weight"):
            # Released moments are divided by it, and its default is true only where nothing was observed.
            raise ValueError("importance_weight is missing or 0, and importance was observed; restore the manifest")
        return counters


class Manifest(BaseModel):
    """What a checkpoint consists of, and what it was made with."""

    model_config = _FROZEN

    format_version: int
    kind: Kind
    run_id: str
    """The id of the run that saved; what it is good for says [Note: trust] in run.py."""
    incarnation: int = 0
    """Which of the run's processes saved, counted as in `RunRecord`."""
    engine: int = 0
    """Which of the engines that save in the folder this was. See [Note: engines] in seats.py."""
    saved_at: str = ""
    """When it was saved: UTC, to the second."""
    versions: dict[str, str] = {}
    """Versions of libraries, epi_ds among them, by name."""
    step: int
    """Optimizer steps before the save, skipped ones included, as DeepSpeed counts them."""
    batch: Batch
    model_dtype: str
    """The dtype of the parameters in the forward pass, as torch calls it."""
    sub_groups: tuple[SavedSubGroup, ...]
    optimizer: SavedOptimizer | None = None
    """None where an earlier release saved: it is then not compared."""
    isolation: Isolation
    files: dict[str, FileRecord]
    """Every file but this one, by path relative to the folder."""

    @property
    def world_size(self) -> int:
        """The number of ranks that saved."""
        return self.batch.world_size

    @property
    def counters(self) -> Counters:
        """What had happened in the run before the save."""
        return Counters.from_dict(self.isolation.counters)

    @property
    def num_bytes(self) -> int:
        """The size of all files together."""
        return sum(record.num_bytes for record in self.files.values())


def remove_manifest(folder: Path) -> None:
    """Make a folder no checkpoint, where it is one, so that it stays none after a crash."""
    path = folder / PATH
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a folder a checkpoint; whole or absent also after a crash."""
    (folder / FOLDER).mkdir(exist_ok=True)
    content = manifest.model_dump(mode="json")
    write_json(folder / PATH, sealed(content))
    sync_folder(folder)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written of a manifest's content: with a digest of its own."""
    return {"digest": _digest(content), **content}


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; None where there is none.

    Raises CheckpointError where it is unreadable, damaged or of another format.
    """
    path = folder / PATH
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} is damaged: it is no manifest")
    saved = {name: value for name, value in content.items() if name != "digest"}
    # Formats before the fourth had no digest.
    version, digest = content.get("format_version"), content.get("digest")
    if digest != _digest(saved) and not (digest is None and version != FORMAT_VERSION):
        raise CheckpointError(f"{path} is damaged: it is not what its digest was made of")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, and this release reads {FORMAT_VERSION}; resume with the epi_ds "
            "release that wrote it"
        )
    try:
        return Manifest.model_validate(saved)
    except ValidationError as error:
        if later := written_later(path, error, release=saved.get("versions", {}).get("epi_ds")):
            raise CheckpointError(later) from None
        raise CheckpointError(summarize(problems_of(error, Manifest), place=str(path))) from None


def written_later(path: Path, error: ValidationError, *, release: str | None = None) -> str | None:
    """Return, in words, that a later release wrote a file; None where something else is wrong with it.

    release  of epi_ds that wrote it, where that is known
    """
    unknown = unknown_keys(error)
    if not unknown:
        return None
    return (
        f"{path} was written by a newer release of epi_ds ({release or 'which one, it does not say'}): this one does "
        f"not know {', '.join(unknown[:5])}. Use the release that wrote it"
    )


def _digest(content: Mapping[str, Any]) -> str:
    return text_digest(json.dumps(content, sort_keys=True, separators=(",", ":")))
