"""An audit finds that what is pulled towards did not change from checkpoint to checkpoint, or where it did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from epi_ds.checkpoint.tensor_file import write_tensor_file
from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.inspect.audit import audit
from tests.support.engines import ds_config, engine_of, train_step
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks
from tests.support.tags import change_manifest, flip_bit, vouch
from tests.zero3.test_anchor import write_folder

pytestmark = pytest.mark.zero3

NUM_ENTRIES = sum(parameter.numel() for parameter in OddNet().parameters())


def save_run(folder: str, to: str, first: int, last: int) -> None:
    """Save after every step; a stage ends after the second one. Nothing is isolated, nor remembered."""
    section: dict[str, Any] = {
        "policy": "none",
        "anchor": {"decay": 1.0, "to": to},
        "checkpoint": {"allow_new_batch_size": True},
    }
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        if first:
            engine.load_checkpoint(folder)
        for step in range(first, last):
            if step == 2:
                engine.epi.finish_stage("first")
            train_step(engine, step, odd_batch)
            engine.save_checkpoint(folder)


def pairs_of(folder: Path) -> list[tuple[str, str]]:
    return [(first.name[-1], second.name[-1]) for first, second in audit([folder]).anchor.pairs]


@pytest.mark.parametrize(
    ("to", "pairs"), [("run", [("1", "2"), ("2", "3"), ("3", "4")]), ("stage", [("1", "2"), ("3", "4")])]
)
def test_the_anchor_of_a_run_and_of_a_stage_did_not_change(
    to: str, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # Stored by two ranks, and then by three.
    run_ranks(save_run, 2, str(folder), to, 0, 3)
    run_ranks(save_run, 3, str(folder), to, 3, 4)
    report = audit([folder])
    # By itself it is worth an audit: nothing is isolated.
    assert (report.pairs, report.isolated) == ((), 0)
    assert pairs_of(folder) == pairs
    assert report.anchor.entries == len(pairs) * NUM_ENTRIES
    assert (report.anchor.num_moved, report.anchor.folders) == (0, ())
    name = move_one_entry(folder / "global_step4", rank=2)
    (moved,) = audit([folder]).anchor.moved
    assert (moved.parameter, moved.num_entries, moved.first.name) == (name, 1, "global_step3")
    command = CliRunner().invoke(app, ["audit", str(folder)])
    assert command.exit_code == 1
    assert f"MOVED 1 entries of the anchor of {name} from " in command.output
    assert f"anchor {len(pairs) * NUM_ENTRIES}, moved 1" in command.output
    shutil.rmtree(folder / "global_step4")
    assert CliRunner().invoke(app, ["audit", str(folder)]).exit_code == 0


def move_one_entry(tag: Path, *, rank: int) -> str:
    """Flip the last bit of one entry that a rank's shard holds of an anchor; return whose it is."""
    path = tag / "epi" / f"rank_{rank:05d}.safetensors"
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    name = next(name for name, value in tensors.items() if name.startswith("anchor/") and value.numel())
    tensors[name].view(torch.int32 if tensors[name].dtype is torch.float32 else torch.int16)[-1] ^= 1
    write_tensor_file(path, tensors, header)
    vouch(tag)
    return name.removeprefix("anchor/")


def test_stages_of_an_earlier_release_are_not_compared(tmp_path: Path) -> None:
    run_ranks(save_run, 2, str(tmp_path), "stage", 0, 2)
    for tag in tmp_path.glob("global_step*"):
        change_manifest(tag, lambda content: content["isolation"]["extra"]["anchor"].update(stage=None))
    with pytest.raises(UserError, match="have isolated entries and training between them"):
        audit([tmp_path])


def test_an_anchor_in_a_folder_is_compared_with_its_digests(tmp_path: Path) -> None:
    base, folder = write_folder(tmp_path / "base"), tmp_path / "run"
    run_ranks(save_run, 2, str(folder), str(base), 0, 2)

    def told() -> tuple[int, str]:
        command = CliRunner().invoke(app, ["audit", str(folder)])
        return command.exit_code, command.output + str(command.exception or "")

    assert told()[0] == 0
    assert f"anchor in {base}: its files are those that were pulled towards" in told()[1]
    flip_bit(base / "model-2.safetensors")
    assert told()[0] == 1
    assert f"CHANGED {base}, which weights are pulled towards: " in told()[1]
    assert "model-2.safetensors" in told()[1]
    shutil.rmtree(base)
    # Nothing is proven, which is no success.
    code, said = told()
    assert code != 0
    assert "isolated entries and training between them" in said
    assert f"weights are pulled towards {base}, which is not there" in said
