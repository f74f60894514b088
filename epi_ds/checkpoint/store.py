"""Isolation state in and out of a tag. What is collective says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epi_ds.checkpoint.catalog import open_checkpoint
from epi_ds.checkpoint.loading import AllRanks
from epi_ds.checkpoint.manifest import FOLDER, Batch, EngineState, Isolation, SavedOptimizer, SavedSubGroup
from epi_ds.checkpoint.optimizers import changed_optimizer
from epi_ds.checkpoint.random_states import random_states, restore_random_states
from epi_ds.checkpoint.saving import TagWriter
from epi_ds.checkpoint.shard import ShardContent, shard_name, write_shard
from epi_ds.checkpoint.shards import TagShards
from epi_ds.checkpoint.tag import Tag, open_shards
from epi_ds.checkpoint.verdict import agree, on_first_rank
from epi_ds.config import EPIConfig
from epi_ds.defaults import with_defaults
from epi_ds.errors import UserError
from epi_ds.isolation.controller import IsolationController
from epi_ds.isolation.layout import Segment
from epi_ds.kernels import Stored

logger = logging.getLogger(__name__)

# Settings that say what the saved numbers mean; the others may change between two runs.
FIXED_SETTINGS = ("policy", "layer", "include", "exclude", "apply", "state", "ema_decay", "memory", "seed")


def _plain(config: EPIConfig) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(config.model_dump_json())
    return saved


# --- saving ---


def write_state(
    writer: TagWriter, controller: IsolationController, others: Mapping[str, Callable[[Segment], Stored]]
) -> None:
    """Write this rank's shard. ``others`` are states that are not the controller's; see `ShardContent.states`."""
    rank, world_size = controller.exchange.rank, controller.exchange.world_size
    path = writer.folder / FOLDER / shard_name(rank)

    def write() -> None:
        content = ShardContent(
            bits_of=controller.masks.segment_bits,
            states={name: state.stored for name, state in controller.states.items()} | dict(others),
            first_mask=controller.refresher.first_mask.sample,
            random_states=random_states(),
        )
        write_shard(path, controller.layout, content, rank=rank, world_size=world_size)

    writer.run(path, write)


def isolation_of(controller: IsolationController, *, extra: EngineState) -> Isolation:
    """Return what the shards do not say. The same on every rank."""
    codes, rows = controller.refresher.threshold_codes, controller.refresher.last_row_codes
    names = controller.layout.layer_names
    return Isolation(
        config=_plain(controller.config),
        counters=controller.counters.to_dict(),
        states=tuple(controller.states),
        threshold_codes=None if codes is None else dict(zip(names, codes.tolist(), strict=True)),
        last_row_codes=None if rows is None else rows.tolist(),
        extra=extra,
    )


# --- loading ---


def check_fits(
    tag: Tag,
    controller: IsolationController,
    *,
    batch: Batch,
    sub_groups: Sequence[SavedSubGroup],
    optimizer: SavedOptimizer,
    allow_new_batch: bool,
) -> None:
    """Raise UserError where a tag is of another run than the one that is to continue; everything at once.

    sub_groups, optimizer  of the engine that loads
    """
    manifest = tag.manifest
    problems = [
        *_changed_settings(manifest.isolation.config, _plain(controller.config)),
        *_changed_parameters(manifest.sub_groups, sub_groups),
        *changed_optimizer(manifest.optimizer, optimizer),
    ]
    if manifest.batch.rows != batch.rows and not allow_new_batch:
        problems.append(
            f"a step was of {manifest.batch} rows and is of {batch}, so the run would continue at other rows and with "
            f"another noise; {_nearest_batches(manifest.batch, batch.world_size)}, or set "
            "checkpoint.allow_new_batch_size: true among the epi settings (method.epi in a recipe)"
        )
    if problems:
        lines = "\n  - ".join(problems)
        raise UserError(
            f"{tag.path} does not fit what is to continue from it:\n  - {lines}\nRestore what changed, or begin a new "
            "run from the weights (load_module_only)"
        )


def _changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    saved = with_defaults(EPIConfig, saved)
    for name in FIXED_SETTINGS:
        if saved.get(name) != current[name]:
            yield f"epi.{name} was {saved.get(name)!r}, is {current[name]!r}"


def _changed_parameters(saved: Sequence[SavedSubGroup], current: Sequence[SavedSubGroup]) -> Iterator[str]:
    before, now = _parameters(saved), _parameters(current)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield (
                f"the trainable parameter {name} had {_described(before.get(name))} and has {_described(now.get(name))}"
            )
            return


def _parameters(sub_groups: Sequence[SavedSubGroup]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return shape and parameter group by name."""
    return {p.name: (p.shape, group.param_group) for group in sub_groups for p in group.parameters}


def _described(parameter: tuple[tuple[int, ...], int] | None) -> str:
    return "no place" if parameter is None else f"shape {parameter[0]} in parameter group {parameter[1]}"


def _nearest_batches(saved: Batch, world_size: int) -> str:
    """Say how the saved number of rows can be had with so many ranks, or with which number of ranks it can."""
    if saved.rows % world_size:
        sizes = [ranks for ranks in range(1, saved.rows + 1) if saved.rows % ranks == 0]
        nearest = sorted(sizes, key=lambda ranks: (abs(ranks - world_size), ranks))[:2]
        return (
            f"{saved.rows} rows cannot be dealt to {world_size} ranks: start {' or '.join(map(str, sorted(nearest)))}"
        )
    per_rank = saved.rows // world_size
    micro_batch = max(size for size in range(1, per_rank + 1) if per_rank % size == 0 and size <= saved.micro_batch)
    return f"set micro-batch {micro_batch} and gradient_accumulation_steps {per_rank // micro_batch}"


def load_state(tag: Tag, controller: IsolationController, *, same_layout: bool) -> None:
    """Replace the controller's state by a verified tag's, whatever number of ranks saved it. Collective.

    Where the layout is the saved one, the random generators of this process continue too.
    """
    isolation = tag.manifest.isolation
    shards = TagShards(*tag)
    codes = isolation.threshold_codes
    rows = isolation.last_row_codes
    own = agree(lambda: shards.shard(controller.exchange.rank)) if same_layout else None
    agree(
        lambda: controller.restore(
            counters=tag.manifest.counters,
            threshold_codes=None if codes is None else torch.tensor([codes[n] for n in controller.layout.layer_names]),
            mask_of=shards.mask,
            states=isolation.states,
            stored_of=shards.stored,
            # Sampled from partitions, so it means nothing to other ones.
            first_mask=[] if own is None else own.first_mask(),
            last_row_codes=None if rows is None else torch.tensor(rows),
        )
    )
    controller.refresher.add_up()
    if own is not None:
        restore_random_states(own.random_tensors(), own.header.random_states)
    elif dist.get_rank() == 0:
        logger.warning(
            "%s was saved with other partitions (%d ranks): random generators begin as this process seeded them, and "
            "the overlap with the first mask of the run is measured from the next one on",
            tag.path,
            tag.manifest.world_size,
        )


def load_masks(folder: str, controller: IsolationController) -> None:
    """Put the masks of a saved tag in force, whatever number of ranks saved it. Collective.

    folder  a tag folder, or a trainer's with a tag in it
    Raises UserError when a covered parameter has no mask there or one of another shape, or when nothing is isolated,
    and CheckpointError where its shards are damaged. Reads no pickle.
    """
    found = on_first_rank(lambda: open_checkpoint(Path(folder)))
    if found.manifest is None:
        raise UserError(f"mask_from: {found.problem}; give the folder of a checkpoint")
    tag = open_shards(found, readers=AllRanks())

    def load() -> None:
        shards = TagShards(*tag)
        _check_masks(shards, tag.path, controller)
        controller.refresher.load(shards.mask)

    agree(load)
    controller.refresher.add_up()
    if not controller.is_active:
        counters = tag.manifest.counters
        raise UserError(
            f"mask_from: the mask in {tag.path} isolates nothing: it was saved before a mask was selected (after "
            f"{counters.applied_steps} steps, {counters.refreshes} refreshes); give a later checkpoint"
        )


def _check_masks(shards: TagShards, folder: Path, controller: IsolationController) -> None:
    saved = shards.shard(0).by_name
    missing = sorted(name for name in controller.layout.by_name if name not in saved)
    if missing:
        raise UserError(
            f"mask_from: {folder} has no mask of {', '.join(missing[:5])}; exclude what was not covered there"
        )
    for segment in controller.layout.segments:
        shape = saved[segment.name].shape
        if shape != segment.shape:
            raise UserError(
                f"mask_from: {folder}: {segment.name} has shape {shape}, this model has {segment.shape}; give a "
                "checkpoint of this model"
            )
