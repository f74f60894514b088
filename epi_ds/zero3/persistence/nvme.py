"""Checkpoints under NVMe offload, whose load DeepSpeed leaves unfinished.

[Note: NVMe load] DeepSpeed copies the swapped files back and reads the weights among them, but neither Adam's moments
nor anything of the sub-groups too small to be swapped: their weights become again those that the model was made with.
All of it is in the checkpoint, in the swapped files and in the optimizer's shard, so the load is finished here.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.checkpoint.deepspeed_files import SWAPPED_SUFFIX, SavedPartitions, loss_scaling_of, swapped_folder
from epi_ds.checkpoint.saving import TagWriter
from epi_ds.checkpoint.tag import Tag
from epi_ds.checkpoint.verdict import agree
from epi_ds.errors import RemedyError


def _swapped_sub_groups(zero3: Any) -> list[int]:
    return [index for index in range(len(zero3.fp16_groups)) if zero3._swappable_optimizer_subgroup(index)]


def swapped_weights(zero3: Any) -> dict[str, str]:
    """Return the name of the file with the weights of every swapped sub-group, by its index; the same on every rank."""
    return {
        str(index): zero3.fp32_partitioned_groups_flat[index].ds_id + SWAPPED_SUFFIX
        for index in _swapped_sub_groups(zero3)
    }


def copy_swapped_files(engine: Any, writer: TagWriter) -> None:
    """Copy this rank's swapped files into a tag that is being saved, as DeepSpeed does, gradients left out."""
    target = swapped_folder(writer.folder, engine.global_rank)
    for source in sorted(Path(engine.optimizer.optimizer_swapper.swap_folder).iterdir()):
        if "gradient" not in source.name:
            writer.run(target / source.name, partial(_copy, source, target / source.name))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def check_swapped_copies(engine: Any, tag: Path) -> None:
    """Raise RemedyError where a tag lacks a swapped file that this rank, by the names of this process, will read."""
    folder = swapped_folder(tag, engine.global_rank)
    missing = [name for name in swapped_weights(engine.optimizer).values() if not (folder / name).is_file()]
    if missing:
        raise RemedyError(
            f"{folder / missing[0]} missing. DeepSpeed names swapped files by a count of all parameters that a process "
            "made, and reads nothing where the names differ: resume in a process that makes its engine as the first "
            "one did, with the same partitioning"
        )


def finish_load(engine: Any, tag: Tag) -> None:
    """Load what DeepSpeed's own load of a tag leaves out. Collective. See [Note: NVMe load].

    Mutates the optimizer's states and weights. Raises CheckpointError on all ranks where one cannot read its shard.
    """
    zero3 = engine.optimizer
    rank = dist.get_rank(zero3.dp_process_group)
    saved = SavedPartitions(*tag)
    shard = agree(lambda: saved.shard(rank))
    for name, value in loss_scaling_of(shard).items():
        setattr(zero3, name, value)
    zero3._set_fp32_optimizer_param_groups()
    zero3.optimizer.load_state_dict(_copied(saved.optimizer_state(rank)))
    zero3._clear_fp32_optimizer_param_groups()
    swapped = set(_swapped_sub_groups(zero3))
    for index, partition in enumerate(zero3.fp32_partitioned_groups_flat):
        if index in swapped:
            _refer_to_files(zero3, partition)
        else:
            partition.data.copy_(saved.flat_weights(rank, index))
    zero3.checkpoint_event_prologue()
    # Takes every sub-group in, copies its weights to the model's, and swaps it out.
    zero3.reset_swap_buffers()
    zero3.checkpoint_event_epilogue()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` whose tensors are in memory: a mapped file may be removed while training."""
    copies = {
        index: {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": copies}


def _refer_to_files(zero3: Any, partition: Any) -> None:
    """Make the state of a swapped partition one whose tensors are in the swapped files, to be read at the next step."""
    swapper = zero3.optimizer_swapper
    state = zero3.optimizer.state[partition]
    tensors = []
    for key in state:
        name = f"{key}-{partition.ds_id}"
        if os.path.isfile(os.path.join(swapper.swap_folder, name + SWAPPED_SUFFIX)):
            # The shard has whatever was in memory at the save.
            state[key] = torch.empty(0, dtype=partition.dtype)
            state[key].ds_id = name
            tensors.append(state[key])
    entry = swapper.swap_params_info[partition.ds_id]
    entry.tensors = entry.tensors[:1]
    entry.add_state_tensors(tensors)
