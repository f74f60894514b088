"""An inspection of a checkpoint says what the engine that saved it knows, whatever number of ranks it had."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.inspect.inspection import Inspection, inspect_checkpoint
from epi_ds.inspect.sources import open_newest
from tests.support.engines import (
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_state,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks
from tests.support.tags import flip_bit
from tests.zero3.test_anchor import write_folder

pytestmark = pytest.mark.zero3


def saved(folder: str, section: dict[str, Any], remembers: str | None = None) -> dict[str, Any]:
    """Train four steps, save after each of the last two, and return what the engine knows."""
    interval = {} if "policy" in section else {"refresh_interval": 2}
    with engine_of(OddNet, ds_config(epi={"ratio": 0.2, **interval, **section})) as engine:
        for step in range(4):
            train_step(engine, step, odd_batch)
            if step == 2:
                engine.save_checkpoint(folder)
        if remembers is not None:
            engine.epi.finish_stage("first")
        engine.save_checkpoint(folder)
        report = engine.epi.stats()
        return {
            "importance": full_importance(engine) if section.get("policy") != "random" else None,
            "masks": full_masks(engine),
            "thresholds": engine.epi.thresholds(),
            "layers": {layer.name: layer.parameters for layer in engine.epi.layers()},
            "isolated": report.isolated,
            "refreshes": report.counters.refreshes,
            "weights": full_weights(engine),
            "anchor": {name: engine.epi.anchor(name) for name in engine.epi.parameter_names}
            if "anchor" in section
            else None,
            "remembered": None if remembers is None else full_state(engine, remembers),
        }


def inspected(path: Path, *, base: Path | None = None, trust: bool = False) -> Inspection:
    return inspect_checkpoint(open_newest(path, base=base, trust=trust), base=base)


def _flat(values: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.cat([values[name].flatten() for name in names])


@pytest.mark.parametrize(
    ("world_size", "section"),
    [
        (1, {"state": "fp32", "apply": "reduction"}),
        (2, {"state": "u16", "normalizer": "mean", "exclude": ["head"]}),
        (1, {"state": "bf16", "layer": "tensor"}),
        (2, {"state": "u8", "layer": {"blocks": "blocks", "rest": "embed|norm|head|scale"}}),
        (2, {"state": "adam", "apply": "update"}),
    ],
    ids=lambda value: value["state"] if isinstance(value, dict) else str(value),
)
def test_it_says_what_the_engine_knows(world_size: int, section: dict[str, Any], tmp_path: Path) -> None:
    known = run_ranks(saved, world_size, str(tmp_path), section)[0]
    found = inspected(tmp_path)
    assert found.checkpoint.name == "global_step4"
    assert (found.facts.step, found.facts.world_size, found.facts.refreshes) == (4, world_size, known["refreshes"])
    assert found.facts.settings["state"] == section["state"]
    assert found.facts.thresholds_are_importance
    assert (found.whole.isolated, found.whole.entries) == (
        known["isolated"],
        sum(mask.numel() for mask in known["masks"].values()),
    )
    assert known["isolated"] > 0
    assert [layer.name for layer in found.layers] == list(known["layers"])
    for layer in found.layers:
        names = known["layers"][layer.name]
        importance, mask = _flat(known["importance"], names), _flat(known["masks"], names)
        assert (layer.entries, layer.isolated) == (mask.numel(), int(mask.sum()))
        assert layer.threshold == known["thresholds"][layer.name]
        # The last refresh was after the last step.
        assert torch.equal(importance >= layer.threshold, mask)
        spread = layer.importance
        assert spread is not None
        assert (spread.smallest, spread.largest) == (float(importance.min()), float(importance.max()))
        assert spread.median == pytest.approx(float(importance.median()), rel=2.0**-8)
        assert known["importance"][spread.largest_at.parameter][spread.largest_at.at] == spread.largest
        assert spread.total == pytest.approx(float(importance.double().sum()), rel=1e-12)
    kinds = {kind.name: (kind.entries, kind.isolated) for kind in found.kinds}
    for kind, pattern in (("embedding", "embed"), ("norm", "norm"), ("head", "head"), ("other", ("blocks", "scale"))):
        names = tuple(name for name in known["masks"] if name.startswith(pattern))
        if names:
            mask = _flat(known["masks"], names)
            assert kinds.pop(kind) == (mask.numel(), int(mask.sum()))
    assert not kinds
    assert sum(cell.isolated for cell in found.cells) == known["isolated"]
    assert found.unknown.keys() == {"distance", "heads"}


def test_distances_are_from_the_anchor_or_from_the_base(tmp_path: Path) -> None:
    known = run_ranks(saved, 2, str(tmp_path / "run"), {"anchor": {"decay": 1.0}, "exclude": ["head"]})[0]
    base = write_folder(tmp_path / "base")
    names = tuple(known["masks"])
    for found in (inspected(tmp_path / "run"), inspected(tmp_path / "run", base=base)):
        for group in (found.whole, *found.layers):
            own = names if group is found.whole else known["layers"][group.name]
            before, now, mask = (_flat(known[what], own) for what in ("anchor", "weights", "masks"))
            difference = now.double() - before.double()
            distance = group.distance
            assert distance is not None
            assert (distance.entries, distance.moved) == (now.numel(), int((now != before).sum()))
            assert distance.rms == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-12)
            assert distance.relative == pytest.approx(float(difference.norm() / before.double().norm()), rel=1e-12)
            assert distance.largest == float(difference.abs().max())
            assert torch.equal(
                (known["weights"][distance.largest_in] - known["anchor"][distance.largest_in]).double().abs().max(),
                difference.abs().max(),
            )
            isolated = difference[mask]
            expected = float(isolated.square().mean().sqrt()) if len(isolated) else None
            assert distance.isolated_rms == (None if expected is None else pytest.approx(expected, rel=1e-12))
        assert found.whole.distance is not None
        assert found.whole.distance.moved > 0
    assert found.origin == f"the weights in {base}"
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        inspected(tmp_path / "run", base=tmp_path)


def test_a_base_that_lacks_parameters_tells_of_the_others(tmp_path: Path) -> None:
    """As where embeddings were resized, or another model was named."""
    known = run_ranks(saved, 1, str(tmp_path / "run"), {})[0]
    base = tmp_path / "base"
    base.mkdir()
    norms = {name: torch.zeros_like(value) for name, value in known["weights"].items() if name.startswith("norm")}
    save_file({**norms, "embed.weight": torch.zeros(2, 13)}, base / "model.safetensors")
    found = inspected(tmp_path / "run", base=base)
    assert set(found.without_origin) == known["masks"].keys() - norms.keys()
    assert [layer.name for layer in found.layers if layer.distance is not None] == ["norm"]
    assert found.whole.distance is not None
    assert found.whole.distance.entries == 26
    # From where all weights were zero, relative to them, they are infinitely far.
    assert found.whole.distance.relative == math.inf
    save_file({"embed.weight": torch.zeros(2, 13)}, base / "model.safetensors")
    with pytest.raises(UserError, match=r"no parameter of the checkpoint \(embed\.weight has shape \(2, 13\) there"):
        inspected(tmp_path / "run", base=base)


def test_an_anchor_in_a_folder_that_changed_is_no_beginning(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base")
    run_ranks(saved, 1, str(tmp_path / "run"), {"anchor": {"decay": 1.0, "to": str(base)}})
    found = inspected(tmp_path / "run")
    assert found.origin == f"the weights in {base} (the anchor)"
    assert found.whole.distance is not None
    flip_bit(base / "model-2.safetensors")
    assert "is not what weights were pulled towards" in inspected(tmp_path / "run").unknown["distance"]
    shutil.rmtree(base)
    assert "which is not there; give the folder" in inspected(tmp_path / "run").unknown["distance"]


@pytest.mark.parametrize(("memory", "state"), [("stage_max", "remembered_relative"), ("per_task", "task/first")])
def test_finished_stages_are_told(memory: str, state: str, tmp_path: Path) -> None:
    known = run_ranks(saved, 2, str(tmp_path), {"memory": memory}, state)[0]
    found = inspected(tmp_path)
    (remembered,) = found.remembered
    values = _flat(known["remembered"], tuple(known["masks"]))
    assert remembered.importance.largest == float(values.max())
    assert remembered.importance.total == pytest.approx(float(values.double().sum()), rel=1e-12)
    assert remembered.name == (
        "first" if memory == "per_task" else "the maximum over all finished stages, each divided by its mean"
    )
    assert found.facts.finished_stages == 1
    assert not found.facts.thresholds_are_importance


def test_what_is_not_measured_is_unknown(tmp_path: Path) -> None:
    known = run_ranks(saved, 1, str(tmp_path), {"policy": "random"})[0]
    found = inspected(tmp_path)
    assert found.whole.isolated == known["isolated"] > 0
    assert found.whole.importance is None
    assert "policy random does not measure it" in found.unknown["importance"]
    told = CliRunner().invoke(app, ["inspect", str(tmp_path), "--picture", str(tmp_path / "map.svg")])
    assert told.exit_code == 0, told.output
    assert "importance unknown: " in told.output
    assert (tmp_path / "map.svg").read_text().startswith("<svg")


def test_a_stranger_s_pickles_and_damaged_files_are_not_read(tmp_path: Path) -> None:
    run_ranks(saved, 2, str(tmp_path / "run"), {"anchor": {"decay": 1.0}})
    newest, base = tmp_path / "run" / "global_step4", write_folder(tmp_path / "base")
    copied = tmp_path / "copied" / newest.name
    shutil.copytree(newest, copied)
    # Its shards are no code, and enough for all but distances.
    found = inspected(copied)
    assert found.whole.importance == inspected(newest).whole.importance
    assert "pass --trust" in found.unknown["distance"]
    with pytest.raises(UserError, match="runs the stranger's code; pass --trust"):
        inspected(copied, base=base)
    assert inspected(copied, trust=True).whole.distance == inspected(newest).whole.distance
    flip_bit(newest / "epi" / "rank_00001.safetensors")
    found = inspected(tmp_path / "run")
    assert found.checkpoint.name == "global_step3"
    (passed_over,) = found.passed_over
    assert "rank_00001.safetensors is damaged" in passed_over
    flip_bit(found.checkpoint / "epi" / "rank_00000.safetensors")
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert str(told.exception).count(" is damaged") == 2


def test_json_has_no_number_that_is_none(tmp_path: Path) -> None:
    """A layer in which nothing is isolated has a threshold of infinity, which JSON has not."""
    known = run_ranks(saved, 1, str(tmp_path), {"ratio": 0.003, "layer": "tensor"})[0]
    thresholds = {name: None if math.isinf(value) else value for name, value in known["thresholds"].items()}
    assert None in thresholds.values()
    told = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"])
    assert told.exit_code == 0, told.output
    content = json.loads(told.stdout)
    assert content["whole"]["isolated"] == known["isolated"]
    assert {layer["name"]: layer["threshold"] for layer in content["layers"]} == thresholds
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path), "--picture", "map.pdf"])
    assert refused.exit_code == 2
    assert "map.pdf must end in .png or .svg" in " ".join(refused.output.split())
