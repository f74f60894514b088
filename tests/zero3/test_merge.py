"""A merge that is weighted by the importance in a checkpoint, whatever number of ranks saved it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from epi_ds.errors import UserError
from epi_ds.inspect.merge import merge_models
from epi_ds.inspect.merge_weights import FisherWeights
from epi_ds.isolation.importance.remembered import RELATIVE
from tests.support.engines import ds_config, engine_of, full_importance, full_state, train_step
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.zero3, pytest.mark.slow]


def saved(folder: str, section: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(3):
            train_step(engine, step, odd_batch)
        if "memory" in section:
            engine.epi.finish_stage("a")
        for step in range(3, 5):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder, "t")
        measured = section.get("policy") != "random"
        found = {"importance": full_importance(engine)} if measured else {}
        return found | ({"remembered": full_state(engine, RELATIVE)} if "memory" in section else {})


def _model_folder(folder: Path, seed: int, **others: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    weights = {**OddNet().state_dict(), **others}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "odd"}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize(
    ("section", "world_size"),
    [
        ({"ratio": 0.1, "refresh_interval": 2, "state": "fp32", "exclude": ["head"]}, 3),
        ({"ratio": 0.1, "refresh_interval": 2, "state": "u8", "memory": "stage_max", "exclude": ["head"]}, 2),
    ],
    ids=["of-the-second", "of-both"],
)
def test_importance_weighs_entries(tmp_path: Path, section: dict[str, Any], world_size: int) -> None:
    states = run_ranks(saved, world_size, str(tmp_path / "run"), section)[0]
    a, b = (_model_folder(tmp_path / name, seed) for seed, name in ((1, "a"), (2, "b")))
    weights = FisherWeights(tmp_path / "run" / "t")
    report = merge_models(tmp_path / "a", tmp_path / "b", tmp_path / "out", alpha=0.3, weights=weights)
    out = load_file(tmp_path / "out" / "model.safetensors")
    covered = states["importance"].keys()
    assert report.weighted == len(covered) < len(b)

    def fisher(state: str, name: str) -> Tensor:
        values = {name: value.double() for name, value in states[state].items()}
        return values[name] / (sum(float(v.sum()) for v in values.values()) / sum(v.numel() for v in values.values()))

    if section["state"] == "u8":
        # Neither model may need them: they are interpolated.
        assert any((states["importance"][name] == 0).any() for name in covered)
    for name in b:
        share = torch.full_like(b[name], 0.3).double()
        if name in covered:
            first = fisher("remembered", name) if "remembered" in states else torch.ones_like(share)
            one, other = 0.7 * first, 0.3 * fisher("importance", name)
            share = torch.where(one + other > 0, other / (one + other), share)
        expected = a[name].double() + share * (b[name].double() - a[name].double())
        assert torch.allclose(out[name].double(), expected, rtol=1e-5, atol=1e-6), name
    odd = {"embed.weight": torch.zeros(12, 13)}
    for name in ("d", "e"):
        _model_folder(tmp_path / name, 4, **odd)
    with pytest.raises(UserError, match=r"is of embed\.weight \(11, 13\), and .* has \(12, 13\)"):
        merge_models(tmp_path / "d", tmp_path / "e", tmp_path / "f", alpha=0.3, weights=weights)


def test_a_checkpoint_without_importance_is_refused(tmp_path: Path) -> None:
    run_ranks(saved, 1, str(tmp_path), {"policy": "random", "ratio": 0.1})
    with pytest.raises(UserError, match=r"holds no importance \(policy: random"):
        FisherWeights(tmp_path / "t")
