"""What an anchor pulls towards, in and out of a tag."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.anchor_config import AnchorConfig
from epi_ds.checkpoint.digest import FileRecord, problems_of_files
from epi_ds.checkpoint.manifest import ANCHOR_STATE, SavedAnchor
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.tag import Tag
from epi_ds.checkpoint.verdict import agree, on_first_rank
from epi_ds.errors import UserError
from epi_ds.isolation.anchor.scale import GradientScale
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.kernels import Stored
from epi_ds.zero3.anchor import Anchor

logger = logging.getLogger(__name__)


def saved_anchor(anchor: Anchor | None) -> SavedAnchor | None:
    """Return what a manifest says of an anchor."""
    if anchor is None:
        return None
    scale = anchor.scale
    return SavedAnchor(
        to=anchor.config.to,
        is_taken=anchor.is_taken,
        folder_files=None if anchor.folder is None else anchor.folder.records,
        totals=anchor.strength.totals,
        square_sum=scale.square_sum,
        weight=scale.weight,
        stage=anchor.ended_stages,
        settings=_settings_of(anchor.config),
    )


def _settings_of(config: AnchorConfig) -> dict[str, Any]:
    """Return what a pull depends on: not where the anchor is kept, and not what it is, which is `SavedAnchor.to`."""
    return config.model_dump(mode="json", exclude={"to", "device"})


def anchor_states(anchor: Anchor | None) -> Mapping[str, Callable[[Segment], Stored]]:
    """Return what the shards hold of an anchor; see `ShardContent.states`."""
    if anchor is None or not anchor.is_taken:
        return {}
    return {ANCHOR_STATE: lambda segment: Stored(anchor.of(segment), torch.zeros(0), segment.global_start)}


def load_anchor(anchor: Anchor | None, tag: Tag, layout: Layout) -> None:
    """Continue with the anchor of a verified tag, whatever number of ranks saved it. Collective.

    Of a tag that was saved without one, or with one that pulled towards other weights, the loaded weights are taken,
    or the folder's. Whatever pulls otherwise than before is told.
    """
    saved = tag.manifest.isolation.extra.anchor
    _tell_of_changes(None if anchor is None else anchor.config, saved, tag)
    if anchor is None:
        return
    anchor.restart()
    if saved is not None and saved.folder_files is not None and anchor.folder is not None:
        files = saved.folder_files
        on_first_rank(lambda: _check_folder(Path(anchor.config.to), files, tag))
        anchor.continues_with_folder()
    elif saved is None or saved.to != anchor.config.to or not _pulled(saved):
        # Where nothing was pulled, nothing was kept to be pulled towards.
        return
    anchor.strength.restore(saved.totals)
    anchor.scale = GradientScale(saved.square_sum, saved.weight)
    anchor.ended_stages = saved.stage or 0
    if not saved.is_taken:
        return
    shards = TagShards(*tag)
    for sub_group, segments in enumerate(layout.by_sub_group):
        anchor.restore(sub_group, agree(partial(_packed, shards, segments)))


def _pulled(saved: SavedAnchor) -> bool:
    """Whether an anchor pulled when it was saved."""
    # An earlier release did not say how: as what it kept tells.
    settings = saved.settings or {"strength": 1.0}
    return bool(settings.get("strength") or settings.get("decay"))


def _tell_of_changes(config: AnchorConfig | None, saved: SavedAnchor | None, tag: Tag) -> None:
    """Warn of whatever pulls otherwise from here on than it did when a tag was saved."""
    pulled = saved if saved is not None and _pulled(saved) else None
    pulls = config if config is not None and config.pulls else None
    if pulls is None and pulled is None:
        return
    before = "nothing was pulled" if pulled is None else f"weights were pulled towards: {pulled.to}"
    if pulls is None:
        _warn(tag, before, "nothing is pulled")
        return
    if pulled is None or pulled.to != pulls.to:
        _warn(
            tag, before, f"{pulls.to} pulls" if pulls.is_folder else f"the anchor is (to: {pulls.to}) what was loaded"
        )
    was, now = {} if pulled is None else pulled.settings or {}, _settings_of(pulls)
    if changed := [name for name, value in was.items() if name in now and now[name] != value]:
        told = (", ".join(f"{name}: {values[name]}" for name in changed) for values in (was, now))
        _warn(tag, f"the anchor had {next(told)}", f"it has {next(told)}")


def _warn(tag: Tag, before: str, now: str) -> None:
    if dist.get_rank() == 0:
        logger.warning("%s: %s when it was saved; from here on %s", tag.path, before, now)


def _check_folder(folder: Path, files: Mapping[str, FileRecord], tag: Tag) -> None:
    """Raise UserError where the files of a folder are not those that the weights were pulled towards."""
    if problems := problems_of_files(folder, files):
        raise UserError(
            f"{tag.path} was saved while weights were pulled towards a folder, and {folder} is not that: "
            f"{'; '.join(problems)}. Restore its files"
        )


def _packed(shards: TagShards, segments: tuple[Segment, ...]) -> Tensor:
    """Return a sub-group's entries, packed. fp32, CPU."""
    # Without any segment there is nothing to join.
    return torch.cat([torch.zeros(0), *(shards.stored(ANCHOR_STATE, one).codes.float() for one in segments)])
