"""Where the numbers of an inspection are read from: the files of one checkpoint, opened as far as they may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.catalog import Checkpoint
from epi_ds.checkpoint.deepspeed_files import WEIGHTS, SavedPartitions
from epi_ds.checkpoint.manifest import Manifest
from epi_ds.checkpoint.run import is_own
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.tag import Consent, Tag, open_shards, open_tag
from epi_ds.choices import StateFormat
from epi_ds.errors import CheckpointError
from epi_ds.inspect.audit_anchor import check_folders
from epi_ds.inspect.distances import AnchorOrigin, FolderOrigin, Origin
from epi_ds.inspect.export import DTYPES
from epi_ds.inspect.overview import found_at
from epi_ds.isolation.layout import Segment
from epi_ds.kernels import decode

IMPORTANCE = "importance"
"""Name of the state of that."""
_SECOND_MOMENT = "exp_avg_sq"
_HOW = "give the folder of the model that training began with (--base)"


class Unknown(NamedTuple):
    """Something that a checkpoint does not say."""

    reason: str
    """Why, and how to get it where that can be done; for people."""


class Opened(NamedTuple):
    """A verified checkpoint."""

    checkpoint: Path
    """Its folder; a trainer's, where the tag lies in one."""
    tag: Tag
    has_weights: bool
    """Whether all files are verified and trusted, or the shards alone are to be read."""
    passed_over: tuple[str, ...]
    """Why newer checkpoints of the folder were not taken."""

    @property
    def run_folder(self) -> Path:
        """The folder of its run, where it lies in one as `epi-ds train` makes it."""
        return self.checkpoint.resolve().parent.parent


def open_newest(path: Path, *, base: Path | None, trust: bool) -> Opened:
    """Open the checkpoint at a path, or of those in a run's folder the newest that is whole.

    Its pickles are read where they are needed, and of another run's only with ``trust``: under ``state: adam``, or
    where ``base`` says that distances are wanted, a stranger's are refused (UserError); that an anchor is in the
    checkpoint is no reason to. Raises CheckpointError where none is whole, and UserError where there is none.
    """
    skipped: list[str] = []
    found = found_at(path)
    for one in reversed(found):
        try:
            if one.problem is not None and len(found) > 1:
                raise CheckpointError(one.problem)
            tag, has_weights = _opened(one, base=base, trust=trust)
            return Opened(one.path, tag, has_weights, tuple(skipped))
        except CheckpointError as error:
            if len(found) == 1:
                raise
            skipped.append(f"{one.path.name}: {error}")
    raise CheckpointError(f"no checkpoint in {path} is whole:\n  " + "\n  ".join(skipped) + "\nrestore one from a copy")


def _opened(found: Checkpoint, *, base: Path | None, trust: bool) -> tuple[Tag, bool]:
    manifest = found.manifest
    if manifest is not None and (
        base is not None
        or _reads_moments(manifest)
        or (manifest.isolation.extra.anchor is not None and (trust or is_own(found.path, manifest.run_id)))
    ):
        return open_tag(found, consent=Consent(trust, "pass --trust")), True
    return open_shards(found), False


def _reads_moments(manifest: Manifest) -> bool:
    return manifest.isolation.config.get("state") == StateFormat.ADAM


Read = Callable[[Segment], Tensor]
"""Returns a slice of a parameter: [real_numel] fp32, CPU."""


def importance_of(opened: Opened, shards: TagShards, segments: tuple[Segment, ...]) -> Read | Unknown:
    """Return what reads the importance that a checkpoint holds."""
    manifest = opened.tag.manifest
    if _reads_moments(manifest):
        return _second_moments(opened, segments)
    if IMPORTANCE not in manifest.isolation.states:
        policy = manifest.isolation.config.get("policy")
        return Unknown(f"the checkpoint holds none: policy {policy} does not measure it, or not any more")
    return lambda segment: decode(shards.stored(IMPORTANCE, segment))


def _second_moments(opened: Opened, segments: tuple[Segment, ...]) -> Read | Unknown:
    """Return what reads the importance of ``state: adam``, as the engine reads it."""
    if opened.tag.manifest.isolation.extra.swapped:
        return Unknown("under state: adam it is the second moments, which NVMe offload keeps in a form of its own")
    saved = SavedPartitions(*opened.tag)
    used = {saved.places[segment.name].sub_group for segment in segments}
    if any(_SECOND_MOMENT not in saved.kinds(sub_group) for sub_group in used):
        return Unknown("under state: adam it is the optimizer's second moments, which the checkpoint does not hold")

    def read(segment: Segment) -> Tensor:
        values = torch.empty(segment.real_numel)
        saved.read_into(values, segment.name, _SECOND_MOMENT, start=segment.global_start)
        return values.clamp_(max=torch.finfo(torch.float32).max)

    return read


def origin_of(
    opened: Opened, shards: TagShards, segments: tuple[Segment, ...], *, base: Path | None
) -> Origin | Unknown:
    """Return where the weights of a checkpoint began: in ``base``, or where its anchor is, if that can be read."""
    manifest = opened.tag.manifest
    anchor, dtype = manifest.isolation.extra.anchor, DTYPES[manifest.model_dtype]
    if base is not None:
        found = FolderOrigin(base, dtype=dtype, label=f"the weights in {base}")
        found.check(segments)
        return found
    if anchor is None:
        return Unknown(f"the checkpoint does not hold where weights began; {_HOW}")
    if not opened.has_weights:
        return Unknown("weights lie in DeepSpeed's pickles, and this is another run's checkpoint; pass --trust")
    if anchor.folder_files is not None:
        (folder,) = check_folders({opened.tag.path: anchor})
        if not folder.is_there:
            return Unknown(f"weights are pulled towards {anchor.to}, which is not there; {_HOW}")
        if folder.problems:
            return Unknown(f"{anchor.to} is not what weights were pulled towards: {folder.problems[0]}; {_HOW}")
        return FolderOrigin(folder.path, dtype=dtype, label=f"the weights in {anchor.to} (the anchor)")
    if not anchor.is_taken:
        return Unknown(f"the anchor is taken in the first step, and there was none; {_HOW}")
    return AnchorOrigin(shards, anchor)


def weights_of(opened: Opened) -> Read:
    """Return what reads the fp32 master weights of a checkpoint that is trusted."""
    saved = SavedPartitions(*opened.tag)

    def read(segment: Segment) -> Tensor:
        weights = torch.empty(segment.real_numel)
        saved.read_into(weights, segment.name, WEIGHTS, start=segment.global_start)
        return weights

    return read
