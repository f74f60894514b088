"""One rank's isolation state as a safetensors file: slices by parameter name, never raw flat buffers.

A flat buffer's layout depends on the world size, on ``sub_group_size`` and on the order of parameters; a slice that
says which parameter it belongs to and where it begins can be read by any other layout. Nothing in it is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from epi_ds.checkpoint.manifest import FOLDER, written_later
from epi_ds.checkpoint.random_states import RandomStates
from epi_ds.checkpoint.tensor_file import write_tensor_file
from epi_ds.errors import CheckpointError
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.kernels import Stored, unpack_bits

_SHARD = re.compile(rf"(^|/){FOLDER}/rank_\d+\.safetensors$")


def shard_name(rank: int) -> str:
    """Return the file name of a rank's shard."""
    return f"rank_{rank:05d}.safetensors"


def is_shard(name: str) -> bool:
    """Return whether a file of a checkpoint, by its path in it, is a rank's shard; the tag may lie in a folder."""
    return _SHARD.search(name) is not None


class Header(BaseModel):
    """What a shard says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    world_size: int
    segments: tuple[Segment, ...]
    random_states: dict[str, Any] = {}
    """Those of generators whose state is no tensor; see random_states.py."""


class ShardContent(NamedTuple):
    """What one rank's shard is written from. Its functions are asked for one segment at a time."""

    bits_of: Callable[[Segment], Tensor]
    """Returns the mask of a segment, packed. [ceil(real_numel / 8)] uint8"""
    states: Mapping[str, Callable[[Segment], Stored]]
    """Functions that return what is stored of a segment, by the name of the state; views will do."""
    first_mask: Sequence[Tensor]
    """Sampled bytes of the run's first mask, by sub-group."""
    random_states: RandomStates
    """The states of this rank's random generators."""


def write_shard(path: Path, layout: Layout, content: ShardContent, *, rank: int, world_size: int) -> None:
    """Write one rank's slices of the parameters that its layout covers."""
    tensors: dict[str, Tensor] = {}
    for segment in layout.segments:
        tensors[f"mask/{segment.name}"] = content.bits_of(segment)
        for state, stored_of in content.states.items():
            stored = stored_of(segment)
            tensors[f"{state}/{segment.name}"] = stored.codes
            if stored.scales.numel():
                tensors[f"scales/{state}/{segment.name}"] = stored.scales
    tensors |= {f"first_mask/{sub_group}": sample for sub_group, sample in enumerate(content.first_mask)}
    random_tensors, others = content.random_states
    tensors |= {f"random/{name}": state for name, state in random_tensors.items()}
    header = Header(rank=rank, world_size=world_size, segments=layout.segments, random_states=dict(others))
    write_tensor_file(path, tensors, {"epi_ds": header.model_dump_json()})


class Shard:
    """A shard that is read a tensor at a time, on the CPU."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file is not a shard."""
        self.path = path
        try:
            # Typed by a stub that says less than there is.
            opened: Any = safe_open(path, framework="pt")
            self._file = opened
            self.header = Header.model_validate_json((self._file.metadata() or {})["epi_ds"])
        except ValidationError as error:
            problem = written_later(path, error) or f"{path} is not a readable isolation shard: {error}"
            raise CheckpointError(problem) from error
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path} is not a readable isolation shard: {problem}") from error
        self._names = set(self._file.keys())
        self.by_name = {segment.name: segment for segment in self.header.segments}

    def mask(self, name: str, start: int, stop: int) -> Tensor:
        """Read entries ``[start, stop)`` of the mask of one parameter's slice. [stop - start] bool"""
        first_byte = start // 8
        bits = self._file.get_slice(f"mask/{name}")[first_byte : -(-stop // 8)]
        return unpack_bits(bits, start - first_byte * 8, stop - first_byte * 8)

    def stored(self, state: str, name: str) -> Stored:
        """Read what is stored of one parameter's slice."""
        scales = f"scales/{state}/{name}"
        return Stored(
            self._file.get_tensor(f"{state}/{name}"),
            self._file.get_tensor(scales) if scales in self._names else torch.zeros(0),
            self.by_name[name].global_start,
        )

    def first_mask(self) -> list[Tensor]:
        """Read the sample of the run's first mask, by sub-group; empty where there was none yet."""
        found = [name for name in self._names if name.startswith("first_mask/")]
        return [self._file.get_tensor(f"first_mask/{sub_group}") for sub_group in range(len(found))]

    def random_tensors(self) -> dict[str, Tensor]:
        """Read the states of generators that are tensors, by name."""
        prefix = "random/"
        found = (name for name in self._names if name.startswith(prefix))
        return {name.removeprefix(prefix): self._file.get_tensor(name) for name in found}
