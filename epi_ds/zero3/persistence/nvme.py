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

from epi_ds.checkpoint.saving import TagWriter

_SUFFIX = ".tensor.swp"


def _swapped_copies(engine: Any, folder: str) -> str:
    return os.path.join(folder, "offloaded_tensors", f"rank{engine.global_rank:0>2d}")


def _swapped_sub_groups(zero3: Any) -> list[int]:
    return [index for index in range(len(zero3.fp16_groups)) if zero3._swappable_optimizer_subgroup(index)]


def swapped_weights(zero3: Any) -> dict[str, str]:
    """Return the name of the file with the weights of every swapped sub-group, by its index; the same on every rank."""
    return {
        str(index): zero3.fp32_partitioned_groups_flat[index].ds_id + _SUFFIX for index in _swapped_sub_groups(zero3)
    }


def copy_swapped_files(engine: Any, writer: TagWriter) -> None:
    """Copy this rank's swapped files into a tag that is being saved, as DeepSpeed does, gradients left out."""
    target = Path(_swapped_copies(engine, str(writer.folder)))
    for source in sorted(Path(engine.optimizer.optimizer_swapper.swap_folder).iterdir()):
        if "gradient" not in source.name:
            writer.run(target / source.name, partial(_copy, source, target / source.name))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def check_swapped_copies(engine: Any, folder: str) -> None:
    """Raise RuntimeError on all ranks where one finds a swapped file missing in a tag. Collective."""
    missing = _of_all_ranks(_missing_file(engine, folder))
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} missing. DeepSpeed names swapped files by a count of all parameters that a process "
            "made, and reads nothing where the names differ: resume in a process that makes its engine as the first "
            "one did, with the same partitioning"
        )


def _of_all_ranks(problem: str | None) -> list[str]:
    """Return the problems of all ranks, so that they raise together: else one raises, and the others wait for it."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return [found for found in problems if found is not None]


def _missing_file(engine: Any, folder: str) -> str | None:
    """Return the first file that the tag should have of this rank, by the names of this process, and has not."""
    for name in swapped_weights(engine.optimizer).values():
        path = os.path.join(_swapped_copies(engine, folder), name)
        if not os.path.isfile(path):
            return path
    return None


def finish_load(engine: Any, folder: str) -> None:
    """Load what DeepSpeed's own load of a tag leaves out. Collective. See [Note: NVMe load].

    Mutates the optimizer's states and weights. Raises RuntimeError on all ranks where one cannot read its shard.
    """
    zero3 = engine.optimizer
    path = engine._get_zero_ckpt_name(*os.path.split(folder))
    saved: dict[str, Any] = {}
    problem = None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
    except Exception as error:  # torn files raise whatever they happen to look like
        problem = f"{path}: {type(error).__name__}: {error}"
    problems = _of_all_ranks(problem)
    if problems:
        raise RuntimeError("shards that cannot be read: " + "; ".join(problems) + "; load another tag")
    zero3.loss_scaler, zero3.dynamic_loss_scale = saved["loss_scaler"], saved["dynamic_loss_scale"]
    zero3._set_fp32_optimizer_param_groups()
    zero3.optimizer.load_state_dict(saved["optimizer_state_dict"])
    zero3._clear_fp32_optimizer_param_groups()
    swapped = set(_swapped_sub_groups(zero3))
    for index, partition in enumerate(zero3.fp32_partitioned_groups_flat):
        if index in swapped:
            _refer_to_files(zero3, partition)
        else:
            partition.data.copy_(saved["fp32_flat_groups"][index])
    zero3.checkpoint_event_prologue()
    # Takes every sub-group in, copies its weights to the model's, and swaps it out.
    zero3.reset_swap_buffers()
    zero3.checkpoint_event_epilogue()


def _refer_to_files(zero3: Any, partition: Any) -> None:
    """Make the state of a swapped partition one whose tensors are in the swapped files, to be read at the next step."""
    swapper = zero3.optimizer_swapper
    state = zero3.optimizer.state[partition]
    tensors = []
    for key in state:
        name = f"{key}-{partition.ds_id}"
        if os.path.isfile(os.path.join(swapper.swap_folder, name + _SUFFIX)):
            # The shard has whatever was in memory at the save.
            state[key] = torch.empty(0, dtype=partition.dtype)
            state[key].ds_id = name
            tensors.append(state[key])
    entry = swapper.swap_params_info[partition.ds_id]
    entry.tensors = entry.tensors[:1]
    entry.add_state_tensors(tensors)
