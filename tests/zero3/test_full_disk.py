"""What one rank alone writes ends all of them with the same words where its disk is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epi_ds.errors import RemedyError
from epi_ds.train.export import write_export
from tests.support.full_disk import full
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3


class Saved:
    """Writes as a model of transformers does."""

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        save_file({"weight": torch.zeros(9)} if state_dict is None else state_dict, folder / "model.safetensors")


def export(folder: str) -> tuple[str, str]:
    with full(), pytest.raises(RemedyError) as raised:
        write_export(Saved(), Saved(), Path(folder), weights={"weight": torch.zeros(64)})
    return type(raised.value.__cause__).__name__, str(raised.value)


def test_an_export_that_cannot_be_written_ends_all_ranks_alike(tmp_path: Path) -> None:
    """Safetensors has an error of its own, which is no OSError, and rank 0 alone meets it."""
    (cause, said), (other, same) = run_ranks(export, 2, str(tmp_path / "export"))
    assert said == same
    assert f"a file in {tmp_path}/export could not be written: " in said
    assert "File too large (os error 27)" in said
    assert (cause, other) == ("DiskError", "NoneType")
