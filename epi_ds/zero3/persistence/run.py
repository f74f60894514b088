"""What an engine knows of its run: where its checkpoints are, and what a tag of it consists of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import epi_ds
from epi_ds.checkpoint.catalog import clean_up
from epi_ds.checkpoint.digest import FileRecord
from epi_ds.checkpoint.manifest import FORMAT_VERSION, Batch, Kind, Manifest, SavedParameter, SavedSubGroup
from epi_ds.checkpoint.run import RunRecord, take_over, why_not_held
from epi_ds.checkpoint.saving import SaveTimes, now
from epi_ds.checkpoint.store import isolation_of
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.errors import CheckpointError
from epi_ds.zero3.persistence.nvme import swapped_weights

logger = logging.getLogger(__name__)


@dataclass
class EngineRun:
    """Where an engine's checkpoints are, and what it knows of them."""

    trainer_folder: Path | None = None
    """The output folder of the trainer that drives the engine: its ``checkpoint-N`` are then what is committed."""
    verified: Path | None = None
    """A checkpoint whose files were read and found whole before the engine was made."""
    held: dict[Path, RunRecord] = field(default_factory=dict)
    """The folders that this process has taken over, with what it wrote there."""
    last_checkpoint: Path | None = None
    """The newest one that was saved or loaded."""
    saved_step: int | None = None
    """The step of that one; None where there is none."""
    failed: Path | None = None
    """The tag of the last save that failed."""
    last_save: SaveTimes | None = None

    def hold(self, folder: Path) -> RunRecord:
        """Make this process the one that saves in a run's folder; return its record there. Collective.

        Raises CheckpointError where another process has taken it over since. See [Note: fence] in run_id.py.
        """
        folder = folder.resolve()
        if folder in self.held:
            record = self.held[folder]
            problem = on_first_rank(lambda: why_not_held(folder, record))
            if problem is not None:
                raise CheckpointError(problem)
            return record

        def take() -> tuple[RunRecord, list[str]]:
            taken = take_over(folder)
            return taken, clean_up(folder)

        record, done = on_first_rank(take)
        if dist.get_rank() == 0:
            for sentence in done:
                logger.warning("%s", sentence)
        self.held[folder] = record
        return record

    def begin_again(self, folder: Path) -> None:
        """Where this process has saved in a folder, go on there as a later process would. Collective.

        What it saves from now on is newer than what it saved before, also where it has gone back to an older step.
        """
        if folder.resolve() in self.held:
            self.hold(folder)
            del self.held[folder.resolve()]


def batch_of(engine: Any) -> Batch:
    """Return the rows of a step."""
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
    states = 3 * 4 * sum(engine.optimizer.fp16_partitioned_groups_flat_numel)
    frozen = [p.ds_tensor for p in engine.module.parameters() if not p.requires_grad]
    own = states + sum(t.numel() * t.element_size() for t in frozen) + engine.epi.memory_report().total_bytes
    total = torch.tensor([own], dtype=torch.int64, device=engine.device)
    dist.all_reduce(total)
    return int(total)


def manifest_of(engine: Any, files: Mapping[str, FileRecord], record: RunRecord) -> Manifest:
    """Return what the manifest of a tag of the engine says. The same on every rank, but for ``files``."""
    zero3 = engine.optimizer
    extra = {
        "clipping": [average.to_dict() for average in zero3.isolation.clipping],
        # For readers that know no DeepSpeed.
        "swapped": swapped_weights(zero3),
    }
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=Kind.TAG,
        run_id=record.run_id,
        incarnation=record.incarnation,
        saved_at=now(),
        versions={"epi_ds": epi_ds.__version__, "deepspeed": deepspeed.__version__, "torch": torch.__version__},
        step=engine.global_steps,
        batch=batch_of(engine),
        model_dtype=str(zero3.dtype).removeprefix("torch."),
        sub_groups=sub_groups_of(zero3),
        isolation=isolation_of(engine.epi.controller, extra=extra),
        files=dict(files),
    )
