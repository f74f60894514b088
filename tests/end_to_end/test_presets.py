"""Every shipped DeepSpeed configuration starts and trains: two ranks, a few steps, with masks that act."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from epi_ds import ds_configs
from epi_ds.data.skills import load_tokenizer
from epi_ds.demo.base_model import small_llama
from tests.end_to_end.recipes import lines_of
from tests.support.forks import epi_ds
from tests.support.nvme import needs_libaio
from tests.support.processes import checked

pytestmark = pytest.mark.end_to_end

RANKS = 2
STEPS = 3
# For a node of two ranks.
CHANGES: dict[str, dict[str, Any]] = {"zero3_hpz": {"zero_optimization": {"zero_hpz_partition_size": RANKS}}}
PRESETS = [pytest.param(name, marks=needs_libaio if "nvme" in name else ()) for name in ds_configs.names()]

Train = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of sizes that no disk is written by.

    On each of two ranks a feed-forward weight is a little over 1 MiB, the least that is swapped. What comes before it
    is no multiple of 512 bytes, behind which DeepSpeed 0.19.8 reads a swapped gradient of the same sub-group wrongly.
    """
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = small_llama(
        len(tokenizer),
        hidden_size=136,
        intermediate_size=3864,
        num_hidden_layers=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a few steps with a shipped configuration; return the run's folder, of the first time if asked again."""
    folder = tmp_path_factory.mktemp("presets")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"q": f"What is {i}?", "a": f"A {i}."}) + "\n" for i in range(2 * RANKS * STEPS))
    )

    def train(name: str) -> Path:
        run = folder / name
        if not run.exists():
            deepspeed = {"preset": name, **CHANGES[name]} if name in CHANGES else name
            recipe = {
                "model": {"path": str(base), "dtype": "float32"},
                "stages": [{"name": "rows", "data": {"path": str(rows), "prompt": "q", "completion": "a"}}],
                "method": {"epi": {"ratio": 0.1, "refresh_interval": 1}},
                "train": {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "deepspeed": deepspeed},
                "output": str(run),
                "ranks": RANKS,
            }
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(recipe))
            checked(epi_ds("train", str(path), num_ranks=RANKS))
        return run

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(trained: Train, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPI_DS_NVME", str(tmp_path / "disk"))
    run = trained(name)
    (summary,) = lines_of(run, "summary")
    # The first mask is selected after the first step.
    assert summary["active_share"] == pytest.approx((STEPS - 1) / STEPS)
    assert 0.09 < summary["achieved_ratio"] <= 0.1
    assert summary["skipped_steps"] == 0
    # Where weights and states are changes nothing, and another section nothing before its first mask acts.
    losses, expected = ([line["loss"] for line in lines_of(of, "step")] for of in (run, trained("zero3")))
    assert len(losses) == STEPS
    same = STEPS - 1 if "epi" in ds_configs.read(name) else STEPS
    assert losses[:same] == pytest.approx(expected[:same], rel=1e-5)
    assert losses[0] > losses[1] > losses[2]
    # On a disk is what is to be there, and nothing else.
    swapped = {path.parent.name for path in tmp_path.rglob("*.tensor.swp")}
    assert swapped == ({"rank0", "rank1"} if "nvme" in name else set())
