"""What an anchor pulls towards, in and out of a tag."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

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
    )


def anchor_states(anchor: Anchor | None) -> Mapping[str, Callable[[Segment], Stored]]:
    """Return what the shards hold of an anchor; see `ShardContent.states`."""
    if anchor is None or not anchor.is_taken:
        return {}
    return {ANCHOR_STATE: lambda segment: Stored(anchor.of(segment), torch.zeros(0), segment.global_start)}


def load_anchor(anchor: Anchor | None, tag: Tag, layout: Layout) -> None:
    """Continue with the anchor of a verified tag, whatever number of ranks saved it. Collective.

    Of a tag that was saved without one, or with one that pulled towards other weights, the loaded weights are taken.
    """
    if anchor is None:
        return
    saved = tag.manifest.isolation.extra.anchor
    anchor.restart()
    if saved is not None and saved.folder_files is not None and anchor.folder is not None:
        files = saved.folder_files
        on_first_rank(lambda: _check_folder(Path(anchor.config.to), files, tag))
        anchor.continues_with_folder()
    elif saved is None or saved.to != anchor.config.to:
        before = "nothing was pulled" if saved is None else f"weights were pulled towards: {saved.to}"
        if dist.get_rank() == 0:
            logger.warning(
                "%s: %s when it was saved; from here on the anchor is (to: %s) what was loaded",
                tag.path,
                before,
                anchor.config.to,
            )
        return
    anchor.strength.restore(saved.totals)
    anchor.scale = GradientScale(saved.square_sum, saved.weight)
    anchor.ended_stages = saved.stage or 0
    if not saved.is_taken:
        return
    shards = TagShards(*tag)
    for sub_group, segments in enumerate(layout.by_sub_group):
        anchor.restore(sub_group, agree(partial(_packed, shards, segments)))


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
