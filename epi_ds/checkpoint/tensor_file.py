"""Writing safetensors a tensor at a time.

The library wants all tensors of a file as separate storages in the host's memory, and copies them once more on their
way out. A rank's state is views of flat buffers, often on a device: here each is brought to the host when it is its
turn. Reading is the library's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# The names of the format.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# Of the header, and so of the first tensor.
_ALIGNMENT = 8


class TensorForm(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def form_named(dtype: str, shape: Sequence[int]) -> TensorForm | None:
    """Return the form that a header gives by the format's name of a dtype; None for one that has no name here."""
    found = next((known for known, name in _NAMES.items() if name == dtype), None)
    return None if found is None else TensorForm(found, tuple(shape))


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any device, views and empty ones too, as a safetensors file.

    Raises ValueError for a dtype that has no name here, before anything is written.
    """
    forms = {name: TensorForm(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensor_file(path, forms, tensors.__getitem__, metadata)


def stream_tensor_file(
    path: Path, forms: Mapping[str, TensorForm], tensor_of: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file whose tensors are asked for one after another, so that no two are in memory.

    tensor_of  a name -> the tensor of that form, on any device

    Raises ValueError for a dtype that has no name here, before anything is written, and for a tensor of another form.
    """
    for name, form in forms.items():
        if form.dtype not in _NAMES:
            raise ValueError(f"{path}: {name} is {form.dtype}, which is none of {', '.join(_NAMES.values())}")
    # The widest first: then each begins at a multiple of its width, which who maps the file relies on.
    names = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    stop = 0
    for name in names:
        form = forms[name]
        start, stop = stop, stop + form.num_bytes
        header[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = tensor_of(name)
            if (tensor.dtype, tuple(tensor.shape)) != forms[name]:
                raise ValueError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, and was to be {forms[name]}")
            values = tensor.detach().cpu().contiguous().view(-1)
            file.write(values.view(torch.uint8).numpy().data)
