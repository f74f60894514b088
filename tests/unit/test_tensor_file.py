"""Files written a tensor at a time, read back by the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from epi_ds.checkpoint.tensor_file import write_tensor_file

DTYPES = [torch.uint8, torch.int16, torch.uint16, torch.bfloat16, torch.float32, torch.int64, torch.bool]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    says=st.text(max_size=20),
)
def test_what_is_written_is_read(
    shapes: list[list[int]], dtypes: list[torch.dtype], says: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("files") / "some.safetensors"
    tensors = {
        f"of ü {index}": torch.randint(0, 2, shape).to(dtype)
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    write_tensor_file(path, tensors, {"says": says})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].tolist() == tensor.tolist()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"says": says}


def test_views_of_one_storage_are_written_each(tmp_path: Path) -> None:
    flat = torch.arange(30, dtype=torch.float32)
    views = {"a": flat[3:7], "b": flat[5:15], "every second": flat[::2], "turned": flat.view(5, 6).T}
    write_tensor_file(tmp_path / "f", views, {})
    loaded = load_file(tmp_path / "f")
    for name, view in views.items():
        assert torch.equal(loaded[name], view)


def test_a_dtype_without_a_name_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b is torch\.complex64, which is none of"):
        write_tensor_file(tmp_path / "f", {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)}, {})
    assert not (tmp_path / "f").exists()
