"""One rank's isolation state as a safetensors file: slices by parameter name, never raw flat buffers.

A flat buffer's layout depends on the world size, on ``sub_group_size`` and on the order of parameters; a slice that
says which parameter it belongs to and where it begins can be read by any other layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from epi_ds.isolation.layout import Layout, Segment
from epi_ds.kernels import Stored, pack_bits, unpack_bits

FORMAT_VERSION = 3


def shard_name(rank: int) -> str:
    """Return the file name of a rank's shard."""
    return f"rank_{rank:05d}.safetensors"


def write_shard(
    path: Path,
    layout: Layout,
    *,
    rank: int,
    world_size: int,
    mask_of: Callable[[Segment], Tensor],
    states: Mapping[str, Callable[[Segment], Stored]],
    first_mask: Sequence[Tensor],
) -> None:
    """Write one rank's slices. All functions are asked for one segment at a time.

    mask_of     -> [real_numel] bool, on the CPU
    states      stored values by the name of the state
    first_mask  sampled bytes of the run's first mask, by sub-group
    """
    tensors: dict[str, Tensor] = {}
    for segment in layout.segments:
        bits = torch.empty(-(-segment.real_numel // 8), dtype=torch.uint8)
        pack_bits(mask_of(segment), bits)
        tensors[f"mask/{segment.name}"] = bits
        for state, stored_of in states.items():
            stored = stored_of(segment)
            # Copies: safetensors refuses views that share a storage.
            tensors[f"{state}/{segment.name}"] = stored.codes.cpu().clone()
            if stored.scales.numel():
                tensors[f"scales/{state}/{segment.name}"] = stored.scales.cpu().clone()
    tensors |= {f"first_mask/{sub_group}": sample.cpu().clone() for sub_group, sample in enumerate(first_mask)}
    header = {
        "format_version": FORMAT_VERSION,
        "rank": rank,
        "world_size": world_size,
        "states": list(states),
        "layer_names": layout.layer_names,
        "segments": [segment._asdict() for segment in layout.segments],
    }
    save_file(tensors, path, metadata={"epi_ds": json.dumps(header)})


@dataclass(frozen=True)
class Shard:
    """An opened shard. Tensors are read one at a time, on the CPU."""

    path: Path
    rank: int
    world_size: int
    layer_names: tuple[str, ...]
    segments: tuple[Segment, ...]
    states: tuple[str, ...]
    """Names of what is stored per entry beside the masks."""

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read a shard's header. Raises RuntimeError when the file is not a shard of a known format."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            header: dict[str, Any] = json.loads(metadata["epi_ds"])
            version = header["format_version"]
            if version != FORMAT_VERSION:
                raise RuntimeError(
                    f"it has format version {version}, this release reads {FORMAT_VERSION}; use the epi_ds release "
                    "that wrote it"
                )
            segments = tuple(Segment(**{**item, "shape": tuple(item["shape"])}) for item in header["segments"])
            return cls(
                path,
                header["rank"],
                header["world_size"],
                tuple(header["layer_names"]),
                segments,
                tuple(header["states"]),
            )
        except Exception as error:  # safetensors raises its own types for torn files
            raise RuntimeError(f"{path} is not a readable isolation shard: {type(error).__name__}: {error}") from error

    def masks(self) -> Iterator[tuple[Segment, Tensor]]:
        """Yield every segment with its mask, [real_numel] bool."""
        with safe_open(self.path, framework="pt") as file:
            for segment in self.segments:
                yield segment, unpack_bits(file.get_tensor(f"mask/{segment.name}"), 0, segment.real_numel)

    def stored(self, state: str) -> dict[str, Stored]:
        """Read one of `states`, by parameter name."""
        with safe_open(self.path, framework="pt") as file:
            names = set(file.keys())
            return {
                segment.name: Stored(
                    file.get_tensor(f"{state}/{segment.name}"),
                    file.get_tensor(scales)
                    if (scales := f"scales/{state}/{segment.name}") in names
                    else torch.zeros(0),
                    segment.global_start,
                )
                for segment in self.segments
            }

    def first_mask(self) -> list[Tensor]:
        """Read the sample of the run's first mask, by sub-group; empty where there was none yet."""
        with safe_open(self.path, framework="pt") as file:
            found = [name for name in file.keys() if name.startswith("first_mask/")]  # noqa: SIM118 - no mapping
            return [file.get_tensor(f"first_mask/{sub_group}") for sub_group in range(len(found))]
