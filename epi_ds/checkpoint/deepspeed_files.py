"""DeepSpeed's files of a tag: their names, their keys, and a reader by parameter, whatever number of ranks saved it.

What DeepSpeed 0.19 calls its files, and what it puts where in them, is known here and nowhere else.

DeepSpeed keeps one flat tensor per sub-group, rank and kind of state, without names. The manifest says which
parameters a sub-group consists of, so every one of them has a place: its slice of ``ceil(numel / ranks)`` entries
behind those before it. Frozen parameters lie in the files of the model, by name, cut in the same way. All these files
are pickles: open them of a verified and trusted tag only. They are mapped, not read: what is copied is what is asked
for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.manifest import Manifest
from epi_ds.checkpoint.slices import pieces_of, slice_numel
from epi_ds.errors import CheckpointError

LATEST = "latest"
"""Name of the file beside the tags that says which was saved last."""
SWAPPED_SUFFIX = ".tensor.swp"
"""How the names of the files end that NVMe offload keeps partitions in, behind DeepSpeed's id of the tensor."""
WEIGHTS = "fp32"
"""What `SavedPartitions.read_into` calls the master weights, as DeepSpeed's universal format does."""

_STATES_FILE = re.compile(r"(model|optim)_states\.pt$")
_OPTIMIZER_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_TAG_NAME = "global_step"
_OPTIMIZER, _FLAT_WEIGHTS = "optimizer_state_dict", "fp32_flat_groups"
_LOSS_SCALING = "loss_scaler", "dynamic_loss_scale", "overflow"
_FROZEN_SHAPES, _FROZEN_SLICES = "frozen_param_shapes", "frozen_param_fragments"
_BUFFER_NAMES, _MODULE = "buffer_names", "module"


# --- names ---


def tag_name(step: int) -> str:
    """Return what DeepSpeed calls a tag that is given no name."""
    return f"{_TAG_NAME}{step}"


def is_tag_name(name: str) -> bool:
    """Return whether DeepSpeed calls tags so by itself."""
    return re.fullmatch(rf"{_TAG_NAME}\d+", name) is not None


def is_states_file(name: str) -> bool:
    """Return whether a file is one of those that make a folder a tag of DeepSpeed's."""
    return _STATES_FILE.search(name) is not None


def is_universal(folder: Path) -> bool:
    """Return whether a folder is a checkpoint in DeepSpeed's universal format, which its converter writes."""
    return (folder / "zero").is_dir() and not any(folder.glob("*_optim_states.pt"))


def model_states_file(rank: int) -> str:
    """Return the name of what a rank saves beside the optimizer: buffers, frozen slices, counters, scheduler."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def swapped_folder(tag: Path, rank: int) -> Path:
    """Return where in a tag the copies of a rank's swapped files lie. ``rank`` is the global one."""
    return tag / "offloaded_tensors" / f"rank{rank:0>2d}"


def universal_weights_file(folder: Path, name: str) -> Path:
    """Return where DeepSpeed's universal format has the master weights of a parameter."""
    return folder / "zero" / name / f"{WEIGHTS}.pt"


def latest_in(folder: Path) -> str | None:
    """Return which tag of a folder was saved last, as far as DeepSpeed's own file says; None where it is missing."""
    path = folder / LATEST
    return path.read_text(errors="replace").strip() if path.is_file() else None


# --- keys ---


def without_frozen_slices(model_states: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rank's model states as DeepSpeed saves them without frozen parameters."""
    return {**model_states, _FROZEN_SLICES: None}


def loss_scaling_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a shard, or ZeRO-3's optimizer by its attributes, says about how losses are scaled."""
    return {name: state[name] for name in _LOSS_SCALING}


def optimizer_shard(loss_scaling: Mapping[str, Any], flat_weights: Sequence[Tensor]) -> dict[str, Any]:
    """Return a rank's shard of weights alone, as ZeRO-3's ``load_state_dict`` takes it.

    flat_weights  of every sub-group, [numel] fp32
    """
    return {**loss_scaling, _FLAT_WEIGHTS: flat_weights}


# --- reading by parameter ---


class Place(NamedTuple):
    """Where the slices of a parameter lie, in every rank's partitions alike."""

    sub_group: int
    offset: int
    """Where its slice begins in the flat partition."""
    numel: int
    """The entries of the whole parameter."""
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
    """The fp32 weights and optimizer states of a tag, and its frozen weights."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """``folder`` is the tag's. See the module on trust."""
        self.folder, self._manifest = folder, manifest
        self.places = places_of(manifest)
        self._opened: dict[int, dict[str, Any]] = {}
        self._models: dict[int, dict[str, Any]] = {}
        self._files = {int(match.group(1)): name for name in manifest.files if (match := _OPTIMIZER_SHARD.search(name))}

    def shard(self, rank: int) -> dict[str, Any]:
        """Return what ZeRO-3 saved of a rank. Raises CheckpointError where it cannot be read."""
        if rank not in self._opened:
            if rank not in self._files:
                raise CheckpointError(f"{self.folder} has no optimizer shard of rank {rank}")
            self._opened[rank] = _mapped(self.folder / self._files[rank])[_OPTIMIZER]
        return self._opened[rank]

    def model_states(self, rank: int) -> dict[str, Any]:
        """Return what DeepSpeed saved of a rank beside the optimizer. Raises CheckpointError where that fails."""
        if rank not in self._models:
            self._models[rank] = _mapped(self.folder / model_states_file(rank))
        return self._models[rank]

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the frozen parameters by name; None where the tag was saved without them."""
        shapes = self.model_states(0)[_FROZEN_SHAPES]
        return None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()}

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter, trained or frozen; None where the tag has none of that name."""
        if name in self.places:
            return self.places[name].shape
        return (self.frozen_shapes or {}).get(name)

    def close(self) -> None:
        """Let go of the files that were opened."""
        self._opened.clear()
        self._models.clear()

    @property
    def world_size(self) -> int:
        """The number of ranks that saved."""
        return self._manifest.world_size

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with their hyper-parameters."""
        groups: list[dict[str, Any]] = self.optimizer_state(0)["param_groups"]
        return groups

    def optimizer_state(self, rank: int) -> dict[str, Any]:
        """Return the ``state_dict`` of a rank's optimizer; its tensors are mapped from the file."""
        state: dict[str, Any] = self.shard(rank)[_OPTIMIZER]
        return state

    def flat_weights(self, rank: int, sub_group: int) -> Tensor:
        """Return the partition of master weights that a shard has, mapped. [numel] fp32, padding included"""
        weights: Tensor = self.shard(rank)[_FLAT_WEIGHTS][sub_group].detach()
        return weights

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's persistent buffers by name, mapped; the same on every rank that saved."""
        states = self.model_states(0)
        for name in states[_BUFFER_NAMES]:
            yield name, states[_MODULE][name]

    def kinds(self, sub_group: int) -> list[str]:
        """Return what the optimizer's state has per entry of a sub-group, by name."""
        numel = self.flat_weights(0, sub_group).numel()
        return [
            name
            for name, value in self._state(0, sub_group).items()
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numel
        ]

    def scalars(self, sub_group: int) -> dict[str, Any]:
        """Return what the optimizer's state has of a sub-group as a whole, such as its step."""
        kinds = self.kinds(sub_group)
        return {name: value for name, value in self._state(0, sub_group).items() if name not in kinds}

    def states_that_stay(self, rank: int) -> Iterator[str]:
        """Yield, in words, which of a rank's optimizer states mean nothing to other partitions.

        One floating-point number per entry can be dealt out again, and so can what is the same on all ranks. Scales of
        blocks and codes of them, or a mean over a partition, are of the partition that they were taken from.
        """
        for index in range(len(self._manifest.sub_groups)):
            numel, first = self.flat_weights(rank, index).numel(), self._state(0, index)
            for name, value in self._state(rank, index).items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numel:
                    if not value.is_floating_point():
                        yield f"{name} of sub-group {index} holds codes ({value.dtype}), and not numbers"
                elif isinstance(value, Tensor) and value.numel() != 1:
                    yield f"{name} of sub-group {index} has {value.numel()} numbers for {numel} entries"
                elif not isinstance(value, (Tensor, bool, int, float, str, type(None))):
                    yield f"{name} of sub-group {index} is a {type(value).__name__}"
                elif name not in first or value != first[name]:
                    there = _number(first.get(name))
                    yield f"{name} of sub-group {index} is {_number(value)} on rank {rank}, and {there} on rank 0"
                elif self.world_size == 1 and _is_fraction(value) and not self._is_everywhere(name, value):
                    yield f"{name} of sub-group {index} is {_number(value)}, which may be of that partition alone"

    def _is_everywhere(self, name: str, value: Any) -> bool:
        """Whether several sub-groups have the same number, which is then no partition's own. Of rank 0."""
        states = [self._state(0, index) for index in range(len(self._manifest.sub_groups))]
        return len(states) > 1 and all(name in state and bool(state[name] == value) for state in states)

    def read_into(self, target: Tensor, name: str, kind: str, *, start: int) -> None:
        """Copy entries from ``start`` on of a parameter that `shape_of` knows, as many as ``target`` has.

        target  [numel] any float dtype, on any device; overwritten
        kind    of a frozen parameter there are weights only, and those of the forward pass
        """
        numel, stop = math.prod(self.shape_of(name) or ()), start + target.numel()
        for piece in pieces_of(numel, world_size=self.world_size, start=start, stop=stop):
            saved = self._slice(name, kind, piece.rank)[piece.start : piece.stop]
            target[piece.offset : piece.offset + piece.numel].copy_(saved)

    def weights(self, name: str) -> Tensor:
        """Return the weights of a whole parameter, in its shape: fp32, those of a frozen one as they are."""
        shape, dtype = self.shape_of(name) or (), self._slice(name, WEIGHTS, 0).dtype
        whole = torch.empty(math.prod(shape), dtype=dtype)
        self.read_into(whole, name, WEIGHTS, start=0)
        return whole.view(shape)

    def _slice(self, name: str, kind: str, rank: int) -> Tensor:
        """Return a rank's slice of a parameter, mapped; what is behind it comes along."""
        place = self.places.get(name)
        if place is None:
            frozen: Tensor = self.model_states(rank)[_FROZEN_SLICES][name]
            return frozen.flatten()
        return self._flat(rank, place.sub_group, kind)[place.offset :]

    def _flat(self, rank: int, sub_group: int, kind: str) -> Tensor:
        swapped = self._manifest.isolation.extra.swapped
        if str(sub_group) in swapped:
            return self._swapped(rank, swapped[str(sub_group)], kind)
        if kind == WEIGHTS:
            return self.flat_weights(rank, sub_group)
        state: Tensor = self._state(rank, sub_group)[kind]
        return state

    def _swapped(self, rank: int, name: str, kind: str) -> Tensor:
        if kind != WEIGHTS:
            raise CheckpointError(
                f"{self.folder}: moments under NVMe offload can be read by the ranks that saved them only"
            )
        file = swapped_folder(self.folder, rank) / name
        # What the shard has of them is whatever was in memory.
        return torch.from_file(str(file), size=file.stat().st_size // 4)

    def _state(self, rank: int, sub_group: int) -> dict[str, Any]:
        # States are numbered in the order of parameter groups, and sub-groups are made in that order.
        state: dict[str, Any] = self.optimizer_state(rank)["state"].get(sub_group, {})
        return state


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _is_fraction(value: Any) -> bool:
    number = _number(value)
    return isinstance(number, float) and not number.is_integer()


def _mapped(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception as error:  # whatever unpickling meets
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return content
