"""``epi-ds study``: a study runs, says what failed, goes on, and its tables are made again from its results alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from epi_ds.study import loading
from epi_ds.study.loading import load_study
from tests.support.forks import epi_ds
from tests.support.processes import checked

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]


def smoke_values() -> Any:
    """What the shipped smoke study says."""
    return yaml.safe_load((Path(loading.__file__).parent / "studies" / "smoke.yaml").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of the shipped smoke study, and its runs in ``work``. To be read only."""
    folder = tmp_path_factory.mktemp("smoke")
    said = checked(
        epi_ds("study", "run", "smoke", "--work", str(folder / "work"), "--results", str(folder / "smoke.jsonl"))
    )
    assert "smoke: 4 cells, 0 of them finished" in said
    assert "started: base of instruct, seed 0" in said
    return folder


def test_every_cell_has_a_line(smoke: Path) -> None:
    lines = [json.loads(line) for line in (smoke / "smoke.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in lines} == set(load_study("smoke").study.arms)
    for line in lines:
        assert (line["status"], line["study"], line["target"], line["seed"]) == ("ok", "smoke", "instruct", 0)
        assert 0 <= line["new"] <= 1
        assert 0 <= line["kept"] <= 1
        # The middles of a run are free.
        merged = line["arm"] == "wise_ft_0.5"
        assert [part["step"] for part in line["path"]] == ([0, 10] if merged else [0, 4, 8, 10])
        assert line["path"][-1] == {"step": 10, "new": line["new"], "kept": line["kept"]}
        assert line["kl_to_base"] > 0
        assert all(-1 <= cosine <= 1 for found in line["conflict"].values() for cosine in found.values())
        assert "sensitivity" not in line
        for name, (before, after) in line["scores"].items():
            flips = line["flips"][name]
            assert flips["wrong_to_right"] - flips["right_to_wrong"] == pytest.approx(after - before)
        assert line["peak_bytes"] > 1 << 28
        # Nothing of this machine, and of models that hundreds of runs would leave.
        assert not list((smoke / "work").rglob("merged"))
        assert not list((smoke / "work").rglob("export"))
        assert str(smoke) not in json.dumps(line)


def test_finished_cells_are_not_run_again(smoke: Path) -> None:
    results = smoke / "smoke.jsonl"
    before = results.read_text()
    said = checked(epi_ds("study", "run", "smoke", "--work", str(smoke / "elsewhere"), "--results", str(results)))
    assert said.strip() == "smoke: 4 cells, 4 of them finished"
    assert results.read_text() == before


def test_tables_are_made_without_the_runs(smoke: Path, tmp_path: Path) -> None:
    results = shutil.copy(smoke / "smoke.jsonl", tmp_path)
    table = checked(epi_ds("study", "table", "smoke", "--markdown", "--results", str(results)))
    assert "| full_lr_1 | 1 | 0." in table
    assert "| anchor_update_2 | 1 | 0." in table
    checked(epi_ds("study", "report", "smoke", "-o", str(tmp_path / "report"), "--results", str(results)))
    assert table.split("\n\n")[2] in (tmp_path / "report" / "study.md").read_text()
    assert (tmp_path / "report" / "plane.svg").read_text().startswith("<svg")
    status = checked(epi_ds("study", "status", "smoke", "--results", str(results)))
    assert "of other settings" not in status


def test_an_order_of_stages_begins_with_a_model_that_there_is(smoke: Path, tmp_path: Path) -> None:
    (base,) = (path for path in (smoke / "work" / "bases").iterdir() if path.is_dir())
    stages = [{"name": skill, "data": {"skill": skill, "rows": 32}} for skill in ("instruct", "logic", "code")]
    values = {
        **smoke_values(),
        "protocol": "stages",
        "base": {"skills": ["code", "dialogue"], "path": str(base)},
        "targets": {"order": stages},
        "arms": {"full_lr_1": {"evaluation.every": None}},
        "frontier": ["full_lr_1"],
    }
    study = tmp_path / "mine.yaml"
    study.write_text(yaml.safe_dump(values))
    checked(epi_ds("study", "run", str(study), "--work", str(tmp_path / "work")))
    (line,) = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert (line["status"], line["protocol"], line["target"]) == ("ok", "stages", "order")
    # Code is trained, so that only dialogue is of the base alone.
    assert {name: len(values) for name, values in line["scores"].items()} == dict.fromkeys(
        ("instruct", "logic", "code", "dialogue"), 4
    )
    assert "backward_transfer" in line
    assert "path" not in line


def test_an_arm_with_importance_says_what_it_knew(smoke: Path, tmp_path: Path) -> None:
    values = smoke_values()
    values["arms"]["epi_20"] = {"method.epi": {"policy": "evolving", "ratio": 0.2, "refresh_interval": 2}}
    study = tmp_path / "mine.yaml"
    study.write_text(yaml.safe_dump(values))
    shutil.copytree(smoke / "work" / "bases", tmp_path / "work" / "bases")
    checked(epi_ds("study", "run", str(study), "--work", str(tmp_path / "work"), "--arms", "epi_20"))
    (line,) = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    # At this size a threshold isolates a little less than is allowed.
    assert 0.15 < line["mask_drift"]["isolated_share"] <= 0.2
    assert line["mask_drift"]["refreshes"] == 5
    assert line["sensitivity"].keys() == line["conflict"].keys() == {"code", "dialogue"}
    for known in line["sensitivity"].values():
        # Online importance is of another task, and yet far from chance.
        assert 0.1 < known["rank_correlation"] < 1
        assert line["mask_drift"]["isolated_share"] < known["held"] < 1
    # Its last checkpoint was read, and is gone with the model.
    run = tmp_path / "work" / "cells" / "instruct" / "epi_20" / "seed_0" / "run"
    assert (run / "metrics.jsonl").is_file()
    assert not (run / "checkpoints").exists()
    table = checked(epi_ds("study", "table", str(study), "--markdown"))
    assert "Importance at the run's end against the base's true squared gradients" in table


def test_a_cell_that_fails_is_told_and_run_again(smoke: Path, tmp_path: Path) -> None:
    values = smoke_values()
    # Answers of skills are short; of rows without any token nothing can be learnt.
    values["arms"] = {"full_lr_1": {"train.max_length": 1}}
    values["frontier"] = ["full_lr_1"]
    study = tmp_path / "mine.yaml"
    study.write_text(yaml.safe_dump(values))
    # The base is the same one.
    shutil.copytree(smoke / "work" / "bases", tmp_path / "work" / "bases")
    said = checked(epi_ds("study", "run", str(study), "--work", str(tmp_path / "work")), exit_code=1)
    assert "1 cells failed" in said
    (line,) = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert line["status"] == "failed"
    assert "exit code" in line["error"]
    assert "new" not in line
    status = checked(epi_ds("study", "status", str(study)))
    assert "failed: full_lr_1, instruct, seed 0" in status
    refused = checked(epi_ds("study", "run", str(study), "--arms", "full"), exit_code=2)
    assert "error: smoke has no arm 'full'; did you mean 'full_lr_1'?" in refused
