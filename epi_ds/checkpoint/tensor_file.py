"""Writing safetensors a tensor at a time.

The library wants all tensors of a file as separate storages in the host's memory, and copies them once more on their
way out. A rank's state is views of flat buffers, often on a device: here each is brought to the host when it is its
turn. Reading is the library's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

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


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any device, views and empty ones too, as a safetensors file.

    Raises ValueError for a dtype that has no name here, before anything is written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, which is none of {', '.join(_NAMES.values())}")
    # The widest first: then each begins at a multiple of its width, which who maps the file relies on.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    stop = 0
    for name in names:
        tensor = tensors[name]
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            values = tensors[name].detach().cpu().contiguous().view(-1)
            file.write(values.view(torch.uint8).numpy().data)
