"""A Hugging Face model on a disk: which tensors its safetensors files hold, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from epi_ds.checkpoint.tensor_file import TensorForm, form_named
from epi_ds.checkpoint.weights_folder import COMPANIONS, INDEX, SINGLE, weight_map
from epi_ds.errors import CheckpointError, UserError

# Of a model with code of its own, too.
_COMPANIONS = (*COMPANIONS, "*.py")


class ModelFolder:
    """The weights of a model, of which nothing but headers is read until a tensor is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where there is no model with safetensors, and CheckpointError where one is damaged."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; give the folder of a Hugging Face model")
        self.path = path
        self.config = self._json("config.json")
        found = weight_map(path)
        if found is None:
            with self._opened(SINGLE) as file:
                found = dict.fromkeys(file.keys(), SINGLE)
        self.places = found
        """Files of the tensors, by name."""

    def _json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}; restore it") from None
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{self.path / name} is no mapping; restore it")
        return dict(values)

    def _opened(self, name: str) -> Any:
        try:
            # Typed by a stub that says less than there is.
            return safe_open(self.path / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}; restore it") from None

    @cached_property
    def forms(self) -> dict[str, TensorForm]:
        """Dtype and shape of every tensor. Raises UserError for a dtype that no weight of a plain model has."""
        found: dict[str, TensorForm] = {}
        for name in sorted(set(self.places.values())):
            with self._opened(name) as file:
                for tensor in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(tensor)
                    form = form_named(part.get_dtype(), part.get_shape())
                    if form is None:
                        raise UserError(
                            f"{self.path / name}: {tensor} is {part.get_dtype()}, a quantized weight; give the model "
                            "as it was before it was quantized"
                        )
                    found[tensor] = form
        if missing := sorted(set(self.places) - set(found)):
            raise CheckpointError(f"{self.path / INDEX} names {missing[0]}, and its file lacks it; restore the folder")
        return found

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the tensors of every file."""
        found: dict[str, list[str]] = {}
        for name, file in self.places.items():
            found.setdefault(file, []).append(name)
        return found

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, on the CPU. Raises CheckpointError where it cannot be read."""
        with self._opened(self.places[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def companions(self) -> list[Path]:
        """Return what the model needs beside its weights: configurations, tokenizer, chat template, code."""
        found = {path for pattern in _COMPANIONS for path in self.path.glob(pattern) if path.name != INDEX}
        return sorted(found)
