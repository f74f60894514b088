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
from epi_ds.checkpoint.tensor_file import TensorForm, form_named
from epi_ds.errors import UserError

SINGLE = "model.safetensors"
"""The file of a model that has one."""
INDEX = "model.safetensors.index.json"
"""Where it stands which file holds which tensor, of a model that has several."""

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
)
"""What a model needs beside its weights, by the names under which transformers looks for it."""


class _Place(NamedTuple):
    file: str
    form: TensorForm
    start: int
    """Of the first byte in the file."""


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file of every tensor of a model, by name, as its index says; None where all are in `SINGLE`.

    Raises UserError where there is neither, and for an index that is none or names what is no file of the folder.
    """
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return None
        raise UserError(
            f"{folder} has neither {SINGLE} nor {INDEX}; give the folder of a model that save_pretrained wrote"
        )
    try:
        found = {str(name): str(file) for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is no index of safetensors ({error!r}); save the model anew") from None
    if outside := [file for file in found.values() if Path(file).name != file]:
        raise UserError(f"{folder / INDEX} names {outside[0]!r}, which is no file of the folder; correct it")
    return found


class WeightsFolder:
    """A folder of safetensors. Nothing of a tensor is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder without safetensors, and for one that is not whole."""
        self.folder = folder
        self._mapped: dict[str, Tensor] = {}
        self._places: dict[str, _Place] = {}
        places = weight_map(folder)
        for name in [SINGLE] if places is None else sorted(set(places.values())):
            self._places |= _places_in(folder / name)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError, with all names, where parameters are not there, or have another shape."""
        found = (self.problem_with(name, shape) for name, shape in shapes.items())
        if problems := [problem for problem in found if problem is not None]:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(
                f"{self.folder} cannot be what these weights are pulled towards: {shown}. Embeddings that were "
                "resized, experts that were merged and adapters have no weights there: give another folder, exclude "
                "them, or set anchor.to: run"
            )

    def problem_with(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return why a parameter cannot be read, in words; None where it is there, in this shape."""
        place = self._places.get(name)
        if place is None:
            return f"{name} is not there"
        return None if place.form.shape == shape else f"{name} has shape {place.form.shape} there, and {shape} here"

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return entries ``[start, stop)`` of a flattened tensor, in the file's dtype, CPU; not to be written to."""
        place = self._places[name]
        if place.file not in self._mapped:
            path = self.folder / place.file
            # Private pages: whatever happens to the tensor, the file stays as it is.
            self._mapped[place.file] = torch.from_file(
                str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
            )
        dtype = place.form.dtype
        first = place.start + start * dtype.itemsize
        found = self._mapped[place.file][first : first + (stop - start) * dtype.itemsize]
        # Nothing says that a tensor begins where its dtype wants to.
        return (found if first % dtype.itemsize == 0 else found.clone()).view(dtype)

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
            form = form_named(entry["dtype"], entry["shape"])
            if form is None or not form.dtype.is_floating_point:
                # Quantized, or no weight: whoever asks for it hears that it is not there.
                continue
            first, last = entry["data_offsets"]
            start = 8 + header_bytes + first
            if last - first != form.num_bytes or start + form.num_bytes > path.stat().st_size:
                raise ValueError(f"{name} does not have the bytes of its shape")
            places[name] = _Place(path.name, form, start)
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}; save the model anew") from None
