"""Every commit resumes what earlier ones saved: sets of checkpoints that were written once, see saved.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.compatibility.saved import RANKS, RECIPE_STEP, TRAINER_STEP, Engine, lines_after, run_engine
from tests.support.forks import epi_ds, run_module
from tests.support.processes import checked
from tests.support.ranks import run_ranks

HERE = Path(__file__).parent
SETS = sorted(path.name for path in HERE.iterdir() if (path / "engine").is_dir())
# Other processors' instructions add fp32 products in another order, which shows in the sixth digit; another row, a
# moment or a learning rate that is not as it was shows in the second or third.
TOLERANCE = 1e-4


@pytest.fixture
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one of the sets, to be written to."""
    shutil.copytree(HERE / request.param, tmp_path / "set")
    return tmp_path / "set"


def resume_engine(folder: str) -> Engine:
    return run_engine(folder, resume=True)


def test_there_is_a_set() -> None:
    assert SETS


@pytest.mark.zero3
@pytest.mark.parametrize("copied", SETS, indirect=True)
def test_engine_resumes_a_saved_tag(copied: Path) -> None:
    found = run_ranks(resume_engine, RANKS, str(copied / "engine" / "checkpoints"))
    expected = [Engine(**one) for one in json.loads((copied / "engine" / "expected.json").read_text())]
    for own, saved in zip(found, expected, strict=True):
        assert own[:3] == saved[:3]
        assert [loss for step in own.losses for loss in step] == pytest.approx(
            [loss for step in saved.losses for loss in step], rel=TOLERANCE
        )


@pytest.mark.end_to_end
@pytest.mark.parametrize("copied", SETS, indirect=True)
def test_trainer_resumes_a_saved_folder(copied: Path) -> None:
    folder = copied / "trainer"
    expected = json.loads((folder / "expected.json").read_text())
    base = copied / "recipe" / "base"
    checked(run_module("tests.end_to_end.plain_sft", str(base), str(folder), "--newest", num_ranks=RANKS))
    result = json.loads((folder / "result.json").read_text())
    assert result["applied_steps"] == expected["applied_steps"]
    assert result["isolated"] == expected["isolated"]
    # The log of before the checkpoint came with it.
    assert result["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert {step: loss for step, loss in result["losses"].items() if int(step) <= TRAINER_STEP} == {
        step: loss for step, loss in expected["losses"].items() if int(step) <= TRAINER_STEP
    }


@pytest.mark.end_to_end
@pytest.mark.parametrize("copied", SETS, indirect=True)
def test_recipe_resumes_a_saved_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied / "recipe"
    monkeypatch.chdir(folder)
    output = checked(epi_ds("train", "recipe.yaml", num_ranks=RANKS))
    assert f"checkpoint-{RECIPE_STEP}" in output
    expected = json.loads((folder / "expected.json").read_text())
    found = lines_after(folder / "run", RECIPE_STEP)
    assert [(line["event"], line["step"]) for line in found] == [(line["event"], line["step"]) for line in expected]
    for own, saved in zip(found, expected, strict=True):
        _assert_close(own, saved)


def _assert_close(own: object, saved: object) -> None:
    if isinstance(saved, dict):
        assert isinstance(own, dict)
        # A later release may say more.
        for name, value in saved.items():
            _assert_close(own[name], value)
    elif isinstance(saved, float):
        assert own == pytest.approx(saved, rel=TOLERANCE)
    else:
        assert own == saved
