"""``epi-ds checkpoints`` and ``epi-ds export`` on the demo's run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from epi_ds.checkpoint.catalog import checkpoints_in
from tests.end_to_end.conftest import Demo
from tests.support.forks import epi_ds
from tests.support.processes import checked, run_epi_ds
from tests.support.tags import flip_bit

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def run(demo: Demo, tmp_path: Path) -> Path:
    """A copy of the run's checkpoints and of what the export is compared with."""
    shutil.copytree(demo.protected / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


@pytest.mark.slow
def test_list_verify_and_prune(run: Path) -> None:
    folder = run / "checkpoints"
    found = checkpoints_in(folder)
    newest = found[-1].path
    (folder / "checkpoint-999.incomplete").mkdir()
    listed = checked(run_epi_ds("checkpoints", "list", str(run)))
    assert all(one.path.name in listed for one in found)
    assert listed.count("complete") == len(found) + 1
    assert "left by an interrupted save" in listed
    assert checked(epi_ds("checkpoints", "verify", str(run))).count(": whole") == len(found)
    assert checked(epi_ds("checkpoints", "verify", str(newest))).count(": whole") == 1
    damaged = newest / "trainer_state.json"
    flip_bit(damaged, at=40)
    said = checked(epi_ds("checkpoints", "verify", str(run)), exit_code=1)
    assert f"{damaged} is damaged" in said
    assert said.count(": whole") == len(found) - 1
    would = checked(epi_ds("checkpoints", "prune", str(run), "--keep-last", "1", "--dry-run"))
    assert would.count("would remove") == len(found) - 1
    assert len(checkpoints_in(folder)) == len(found)
    checked(epi_ds("checkpoints", "prune", str(run), "--keep-last", "1"))
    assert [one.path for one in checkpoints_in(folder)] == [newest]
    refused = epi_ds("export", str(newest), str(run / "export"))
    checked(refused, 1)
    assert f"error: {damaged} is damaged" in refused.output
    assert "Traceback" not in refused.output


def test_export_is_the_model(demo: Demo, run: Path, tmp_path: Path) -> None:
    newest = checkpoints_in(run / "checkpoints")[-1].path
    out = tmp_path / "exported"
    said = checked(epi_ds("export", str(newest), str(out), "--verify", "--shard-size", "0.001"))
    assert "38 tensors have the bits of" in said
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    model, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (out, demo.protected / "export"))
    for (name, one), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert model.generation_config == expected.generation_config
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (out, demo.protected / "export")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0]("What is 3 + 4?") == tokenizers[1]("What is 3 + 4?")
    half = tmp_path / "half"
    checked(epi_ds("export", str(newest), str(half), "--dtype", "bfloat16", "--verify"))
    small = AutoModelForCausalLM.from_pretrained(half)
    assert small.dtype is torch.bfloat16
    assert all(torch.equal(small.state_dict()[name], value.bfloat16()) for name, value in model.state_dict().items())
    # Nothing is written over.
    checked(epi_ds("export", str(newest), str(half)), 2)


@pytest.mark.slow
def test_a_stranger_s_checkpoint_is_read_with_consent_only(run: Path, tmp_path: Path) -> None:
    newest = checkpoints_in(run / "checkpoints")[-1].path
    shutil.copytree(newest, tmp_path / "copied" / newest.name)
    for command in (["export"], ["checkpoints", "convert"]):
        refused = epi_ds(*command, str(tmp_path / "copied" / newest.name), str(tmp_path / "out"))
        checked(refused, 2)
        assert "runs the stranger's code; pass --trust if you know where it comes from" in refused.output
    checked(epi_ds("export", str(tmp_path / "copied" / newest.name), str(tmp_path / "out"), "--trust"))


@pytest.mark.slow
def test_convert_says_what_it_loses_and_keeps_the_weights(run: Path, tmp_path: Path) -> None:
    newest = checkpoints_in(run / "checkpoints")[-1].path
    said = checked(epi_ds("checkpoints", "convert", str(newest), str(tmp_path / "universal")))
    assert "importance, masks and counters" in said
    assert "every weight has the bits of" in said
    assert (tmp_path / "universal" / "zero").is_dir()
