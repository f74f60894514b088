"""What a tag of an engine consists of, and how large it will be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import epi_ds
from epi_ds.checkpoint.digest import FileRecord
from epi_ds.checkpoint.manifest import FORMAT_VERSION, Batch, EngineState, Kind, Manifest, SavedParameter, SavedSubGroup
from epi_ds.checkpoint.run import RunRecord
from epi_ds.checkpoint.saving import now
from epi_ds.checkpoint.store import isolation_of
from epi_ds.zero3.persistence.anchor import saved_anchor
from epi_ds.zero3.persistence.nvme import swapped_weights
from epi_ds.zero3.persistence.optimizers import optimizer_of


def batch_of(engine: Any) -> Batch:
    """Return how the rows of an optimizer step are dealt out."""
    return Batch(
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        accumulation=engine.gradient_accumulation_steps(),
        world_size=dist.get_world_size(engine.optimizer.dp_process_group),
    )


def sub_groups_of(zero3: Any) -> tuple[SavedSubGroup, ...]:
    """Return the parameters of ZeRO-3's sub-groups, in order."""
    return tuple(
        SavedSubGroup(
            param_group=zero3.sub_group_to_group_id[index],
            parameters=tuple(SavedParameter(name=zero3.param_names[one], shape=tuple(one.ds_shape)) for one in group),
        )
        for index, group in enumerate(zero3.fp16_groups)
    )


def bytes_to_save(engine: Any) -> int:
    """Return what a tag takes, over all ranks: weights and two moments, frozen parameters, isolation. Collective."""
    total = torch.tensor([own_bytes_to_save(engine)], dtype=torch.int64, device=engine.device)
    dist.all_reduce(total)
    return int(total)


def own_bytes_to_save(engine: Any) -> int:
    """Return what this rank has of that."""
    states = 3 * 4 * sum(engine.optimizer.fp16_partitioned_groups_flat_numel)
    frozen = [p.ds_tensor for p in engine.module.parameters() if not p.requires_grad]
    return int(states + sum(t.numel() * t.element_size() for t in frozen) + engine.epi.memory_report().total_bytes)


def manifest_of(engine: Any, files: Mapping[str, FileRecord], record: RunRecord, *, number: int) -> Manifest:
    """Return what the manifest of a tag of the engine says. The same on every rank, but for ``files``.

    number  of the engine in the folder: see [Note: engines] in seats.py
    """
    zero3 = engine.optimizer
    extra = EngineState(
        clipping=tuple(average.to_dict() for average in zero3._epi_context.clipping),
        swapped=swapped_weights(zero3),
        anchor=saved_anchor(zero3._epi_context.anchor),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=Kind.TAG,
        run_id=record.run_id,
        incarnation=record.incarnation,
        engine=number,
        saved_at=now(),
        versions={"epi_ds": epi_ds.__version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__},
        step=engine.global_steps,
        batch=batch_of(engine),
        model_dtype=str(zero3.dtype).removeprefix("torch."),
        sub_groups=sub_groups_of(zero3),
        optimizer=optimizer_of(zero3),
        isolation=isolation_of(engine.epi.controller, extra=extra),
        files=dict(files),
    )
