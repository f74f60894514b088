"""``epi/manifest.json``: written last, by rename. A folder without one is no checkpoint.

It names every file below the folder with its size and checksum, and says what they were made with; a digest of its
own text is in it too, so that a flipped bit does not become another step or another ratio. The folder is a tag of
DeepSpeed's, or a trainer's ``checkpoint-N`` with a tag in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from epi_ds.checkpoint.digest import FileRecord, text_digest
from epi_ds.checkpoint.durable import sync_folder, write_json
from epi_ds.errors import CheckpointError, problems_of, summarize
from epi_ds.isolation.counters import Counters

FOLDER = "epi"
FILE = "manifest.json"
# Where it lies, from the folder that it vouches for.
PATH = f"{FOLDER}/{FILE}"
FORMAT_VERSION = 4

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
        """Over all ranks."""
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


class Isolation(BaseModel):
    """What the shards do not say of the isolation of a tag."""

    model_config = _FROZEN

    config: dict[str, Any]
    counters: dict[str, int | float]
    states: tuple[str, ...]
    """Names of what is stored per entry beside the masks."""
    threshold_codes: dict[str, int] | None
    """Threshold code of each layer; None before the first refresh."""
    last_row_codes: list[int] | None
    """Where the last search ended (`Thresholds.row_codes`); what an adaptive run decides next depends on it."""
    extra: dict[str, Any]


class Manifest(BaseModel):
    """What a checkpoint consists of, and what it was made with."""

    model_config = _FROZEN

    format_version: int
    kind: Kind
    run_id: str
    """See [Note: trust] in run.py."""
    incarnation: int
    saved_at: str
    versions: dict[str, str]
    step: int
    """Optimizer steps before the save, skipped ones included, as DeepSpeed counts them."""
    batch: Batch
    model_dtype: str
    """Of the parameters in the forward pass."""
    sub_groups: tuple[SavedSubGroup, ...]
    isolation: Isolation
    files: dict[str, FileRecord]
    """All of them but this one, by path relative to the folder."""

    @property
    def world_size(self) -> int:
        """Ranks that saved."""
        return self.batch.world_size

    @property
    def counters(self) -> Counters:
        """What had happened in the run before the save."""
        return Counters.from_dict(self.isolation.counters)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
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
    write_json(folder / PATH, {"digest": _digest(content), **content})
    sync_folder(folder)


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
        raise CheckpointError(summarize(problems_of(error, Manifest), place=str(path))) from None


def _digest(content: Mapping[str, Any]) -> str:
    return text_digest(json.dumps(content, sort_keys=True, separators=(",", ":")))
