"""Weights as Hugging Face saves them, read by flat ranges: a rank's slice of a parameter is one run of a file's bytes.

The files are mapped into memory, so a range that is read takes no room but the pages that the system can drop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.checkpoint.digest import FileRecord, records_of
from epi_ds.errors import UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class _Place(NamedTuple):
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of the first byte in the file."""


class WeightsFolder:
    """A folder of safetensors. Nothing of a tensor is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder without safetensors, and for one that is not whole."""
        self.folder = folder
        self._mapped: dict[str, Tensor] = {}
        self._places: dict[str, _Place] = {}
        for name in self._files():
            self._places |= _places_in(folder / name)

    def _files(self) -> list[str]:
        try:
            if (self.folder / _INDEX).exists():
                return sorted(set(json.loads((self.folder / _INDEX).read_text())["weight_map"].values()))
            if (self.folder / _SINGLE).exists():
                return [_SINGLE]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.folder / _INDEX} is no index of safetensors: {error}; save the model anew"
            ) from None
        raise UserError(
            f"{self.folder} holds neither {_SINGLE} nor {_INDEX}; give the folder of a model in safetensors"
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError, with all names, where parameters are not there, or have another shape."""
        problems = []
        for name, shape in shapes.items():
            place = self._places.get(name)
            if place is None:
                problems.append(f"{name} is not there")
            elif place.shape != shape:
                problems.append(f"{name} has shape {place.shape} there, and {shape} here")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(
                f"{self.folder} cannot be what these weights are pulled towards: {shown}. Embeddings that were "
                "resized, experts that were merged and adapters have no weights there: give another folder, exclude "
                "them, or set anchor.to: run"
            )

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return entries ``[start, stop)`` of a flattened tensor, in the file's dtype, CPU; not to be written to."""
        place = self._places[name]
        if place.file not in self._mapped:
            path = self.folder / place.file
            # Private pages: whatever happens to the tensor, the file stays as it is.
            self._mapped[place.file] = torch.from_file(
                str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
            )
        first = place.start + start * place.dtype.itemsize
        found = self._mapped[place.file][first : first + (stop - start) * place.dtype.itemsize]
        # Nothing says that a tensor begins where its dtype wants to.
        return (found if first % place.dtype.itemsize == 0 else found.clone()).view(place.dtype)

    def records(self) -> dict[str, FileRecord]:
        """Read the files whole and return their records, by name."""
        return records_of(self.folder, sorted({place.file for place in self._places.values()}))


def _places_in(path: Path) -> dict[str, _Place]:
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(header_bytes))
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                # Of another kind: whoever asks for it hears that it is not there.
                continue
            start = 8 + header_bytes + first
            num_bytes = dtype.itemsize * torch.Size(shape).numel()
            if last - first != num_bytes or start + num_bytes > path.stat().st_size:
                raise ValueError(f"{name} does not have the bytes of its shape")
            places[name] = _Place(path.name, dtype, shape, start)
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}; save the model anew") from None
