"""DeepSpeed's optimizer shards of a tag, read by parameter: any slice, whatever number of ranks saved it.

DeepSpeed keeps one flat tensor per sub-group, rank and kind of state, without names. The manifest says which
parameters a sub-group consists of, so every one of them has a place: its slice of ``ceil(numel / ranks)`` entries
behind those before it. These files are pickles: open them of a verified and trusted tag only. They are mapped, not
read: what is copied is what is asked for.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.manifest import Manifest
from epi_ds.checkpoint.slices import pieces_of, slice_numel
from epi_ds.errors import CheckpointError

WEIGHTS = "fp32"
_OPTIMIZER_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


class Place(NamedTuple):
    """Where the slices of a parameter lie, in every rank's partitions alike."""

    sub_group: int
    offset: int
    """In the flat partition."""
    numel: int
    """Of the whole parameter."""
    shape: tuple[int, ...]


def places_of(manifest: Manifest) -> dict[str, Place]:
    """Return the place of every trainable parameter, by name."""
    places = {}
    for index, sub_group in enumerate(manifest.sub_groups):
        offset = 0
        for parameter in sub_group.parameters:
            numel = math.prod(parameter.shape)
            places[parameter.name] = Place(index, offset, numel, parameter.shape)
            offset += slice_numel(numel, manifest.world_size)
    return places


class SavedPartitions:
    """The fp32 weights and optimizer states of a tag."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """``folder`` is the tag's. See the module on trust."""
        self.folder, self._manifest = folder, manifest
        self.places = places_of(manifest)
        self._opened: dict[int, dict[str, Any]] = {}
        self._files = {int(match.group(1)): name for name in manifest.files if (match := _OPTIMIZER_SHARD.search(name))}

    def shard(self, rank: int) -> dict[str, Any]:
        """Return what ZeRO-3 saved of a rank. Raises CheckpointError where it cannot be read."""
        if rank not in self._opened:
            if rank not in self._files:
                raise CheckpointError(f"{self.folder} has no optimizer shard of rank {rank}")
            path = self.folder / self._files[rank]
            try:
                content = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
                self._opened[rank] = content["optimizer_state_dict"]
            except Exception as error:  # whatever unpickling meets
                raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return self._opened[rank]

    def close(self) -> None:
        """Let go of the files that were opened."""
        self._opened.clear()

    @property
    def world_size(self) -> int:
        """Ranks that saved."""
        return self._manifest.world_size

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with their hyper-parameters."""
        groups: list[dict[str, Any]] = self.shard(0)["optimizer_state_dict"]["param_groups"]
        return groups

    def kinds(self, sub_group: int) -> list[str]:
        """Return what the optimizer's state has per entry of a sub-group, by name."""
        numel = self.shard(0)["fp32_flat_groups"][sub_group].numel()
        return [
            name
            for name, value in self._state(0, sub_group).items()
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numel
        ]

    def scalars(self, sub_group: int) -> dict[str, Any]:
        """Return what the optimizer's state has of a sub-group as a whole, such as its step."""
        kinds = self.kinds(sub_group)
        return {name: value for name, value in self._state(0, sub_group).items() if name not in kinds}

    def read_into(self, target: Tensor, name: str, kind: str, *, start: int) -> None:
        """Copy entries from ``start`` on of a parameter, as many as ``target`` has.

        target  [numel] any float dtype, on any device; overwritten
        """
        place = self.places[name]
        stop = start + target.numel()
        for piece in pieces_of(place.numel, world_size=self.world_size, start=start, stop=stop):
            flat = self._flat(piece.rank, place.sub_group, kind)
            saved = flat[place.offset + piece.start : place.offset + piece.stop]
            target[piece.offset : piece.offset + piece.numel].copy_(saved)

    def weights(self, name: str) -> Tensor:
        """Return the fp32 weights of a whole parameter, in its shape."""
        place = self.places[name]
        whole = torch.empty(place.numel)
        self.read_into(whole, name, WEIGHTS, start=0)
        return whole.view(place.shape)

    def flat_weights(self, rank: int, sub_group: int) -> Tensor:
        """Return the flat fp32 partition of a rank: mapped, or from the files of NVMe offload."""
        return self._flat(rank, sub_group, WEIGHTS)

    def _flat(self, rank: int, sub_group: int, kind: str) -> Tensor:
        swapped = self._manifest.isolation.extra.get("swapped", {})
        if str(sub_group) in swapped:
            return self._swapped(rank, swapped[str(sub_group)], kind)
        if kind == WEIGHTS:
            weights: Tensor = self.shard(rank)["fp32_flat_groups"][sub_group].detach()
            return weights
        state: Tensor = self._state(rank, sub_group)[kind]
        return state

    def _swapped(self, rank: int, name: str, kind: str) -> Tensor:
        if kind != WEIGHTS:
            raise CheckpointError(
                f"{self.folder}: moments under NVMe offload can be read by the ranks that saved them only"
            )
        file = self.folder / "offloaded_tensors" / f"rank{rank:0>2d}" / name
        # What the shard has of them is whatever was in memory.
        return torch.from_file(str(file), size=file.stat().st_size // 4)

    def _state(self, rank: int, sub_group: int) -> dict[str, Any]:
        # States are numbered in the order of parameter groups, and sub-groups are made in that order.
        state: dict[str, Any] = self.shard(rank)["optimizer_state_dict"]["state"].get(sub_group, {})
        return state
