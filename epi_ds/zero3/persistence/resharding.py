"""Weights and optimizer states of a tag that other ranks, or other sub-groups, saved.

DeepSpeed loads a checkpoint with as many ranks as saved it. Its universal format is for others, and has three gaps:
it drops all but Adam's moments, it gives every parameter group the hyper-parameters of the first, and it takes
another copy of the whole checkpoint on the disk. Slices by parameter have none: every rank copies its own entries out
of the shards, bit for bit, and holds nothing besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.checkpoint.deepspeed_files import WEIGHTS, SavedPartitions, loss_scaling_of, optimizer_shard
from epi_ds.errors import CheckpointError, UserError


def load_partitions(zero3: Any, saved: SavedPartitions, *, weights_only: bool) -> None:
    """Replace the weights of a ZeRO-3 optimizer by those of a tag, and its state unless only weights are wanted.

    Raises CheckpointError where the state of a sub-group would be of parts that differ in more than their entries.
    """
    with torch.no_grad():
        for index, partition in enumerate(zero3.fp32_partitioned_groups_flat):
            _fill(partition.data, zero3, index, saved, WEIGHTS)
        if not weights_only:
            _load_states(zero3, saved)
    # What ZeRO-3 does after a load of its own: the fp32 weights become the model's, and losses are scaled as they were.
    scaling = loss_scaling_of(saved.shard(0) if not weights_only else vars(zero3))
    content = optimizer_shard(scaling, zero3.fp32_partitioned_groups_flat)
    zero3.load_state_dict([content] * dist.get_world_size(zero3.dp_process_group), load_optimizer_states=False)


def load_frozen(engine: Any, saved: SavedPartitions) -> list[str]:
    """Replace this rank's slices of frozen parameters by those of a tag; return the names of those it does not hold.

    Raises UserError where one has another shape there.
    """
    zero3 = engine.optimizer
    trained = {id(parameter) for group in zero3.fp16_groups for parameter in group}
    rank, missing = dist.get_rank(zero3.dp_process_group), []
    for parameter in engine.module.parameters():
        if id(parameter) in trained:
            continue
        name, shape = engine.param_names[parameter], tuple(parameter.ds_shape)
        there = saved.shape_of(name)
        if there is None:
            missing.append(name)
            continue
        if there != shape:
            raise UserError(f"{saved.folder}: {name} has shape {there} there, and {shape} here; load another tag")
        start = min(rank * parameter.partition_numel(), parameter.ds_numel)
        stop = min(start + parameter.partition_numel(), parameter.ds_numel)
        with torch.no_grad():
            saved.read_into(parameter.ds_tensor.data.view(-1)[: stop - start], name, WEIGHTS, start=start)
    return missing


def check_parameters(zero3: Any, saved: SavedPartitions) -> None:
    """Raise UserError where a tag is of a model of other parameters."""
    for group in zero3.fp16_groups:
        for parameter in group:
            name, shape = zero3.param_names[parameter], tuple(parameter.ds_shape)
            saved_shape = saved.shape_of(name)
            if saved_shape != shape:
                there = "none of that name" if saved_shape is None else f"one of shape {saved_shape}"
                raise UserError(
                    f"{saved.folder} is of another model: {name} has shape {shape} here, and the checkpoint has {there}"
                )


def check_states(zero3: Any, saved: SavedPartitions) -> None:
    """Raise UserError where optimizer states of a tag cannot be dealt out to other partitions. Each rank reads some."""
    group = zero3.dp_process_group
    for rank in range(dist.get_rank(group), saved.world_size, dist.get_world_size(group)):
        if (problem := next(saved.states_that_stay(rank), None)) is not None:
            raise UserError(
                f"{saved.folder} was saved by {saved.world_size} ranks with other partitions than here, and the states "
                f"of {type(zero3.optimizer).__name__} cannot be dealt out again: {problem}. Resume with "
                f"{saved.world_size} ranks and the sub_group_size that saved, or begin a new run from the weights "
                "(load_module_only)"
            )


def _fill(flat: Tensor, zero3: Any, sub_group: int, saved: SavedPartitions, kind: str) -> None:
    """Copy this rank's entries of every parameter of a sub-group into a flat partition; padding is left alone."""
    rank, offset = dist.get_rank(zero3.dp_process_group), 0
    for parameter in zero3.fp16_groups[sub_group]:
        size = parameter.partition_numel()
        start = min(rank * size, parameter.ds_numel)
        stop = min(start + size, parameter.ds_numel)
        saved.read_into(flat[offset : offset + stop - start], zero3.param_names[parameter], kind, start=start)
        offset += size


def _load_states(zero3: Any, saved: SavedPartitions) -> None:
    states: dict[int, dict[str, Any]] = {}
    for index, partition in enumerate(zero3.fp32_partitioned_groups_flat):
        names = [zero3.param_names[parameter] for parameter in zero3.fp16_groups[index]]
        kinds, scalars = _common(saved, names)
        state: dict[str, Any] = dict(scalars)
        there = zero3.optimizer.state.get(partition, {})
        for kind in kinds:
            old = there.get(kind)
            # In place where there are any: old and new moments at once are twice the optimizer's memory.
            state[kind] = (
                old if isinstance(old, Tensor) and _alike(old, partition) else torch.zeros_like(partition.data)
            )
            _fill(state[kind], zero3, index, saved, kind)
        if state:
            states[index] = state
    zero3._set_fp32_optimizer_param_groups()
    numbers = iter(range(len(zero3.fp32_partitioned_groups_flat)))
    # Every group with its own hyper-parameters.
    groups = [
        {**group, "params": [next(numbers) for _ in own["params"]]}
        for group, own in zip(saved.param_groups, zero3.optimizer.param_groups, strict=True)
    ]
    zero3.optimizer.load_state_dict({"state": states, "param_groups": groups})
    zero3._clear_fp32_optimizer_param_groups()


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _common(saved: SavedPartitions, names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the kinds and the scalars of the saved sub-groups that some parameters come from: the same in all."""
    sub_groups = list(dict.fromkeys(saved.places[name].sub_group for name in names))
    first, *others = [(saved.kinds(sub_group), saved.scalars(sub_group)) for sub_group in sub_groups]
    for sub_group, other in zip(sub_groups[1:], others, strict=True):
        if other != first:
            raise CheckpointError(
                f"{saved.folder}: sub-groups {sub_groups[0]} and {sub_group} have optimizer states of different kinds "
                f"or ages ({first} and {other}), and would become one here; set the sub_group_size that saved them"
            )
    return first
