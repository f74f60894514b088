"""The files of a run: metrics that survive kills, where a run continues."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from epi_ds.checkpoint.catalog import open_checkpoint
from epi_ds.checkpoint.trainer_folder import TRAINER_STATE
from epi_ds.config import EPIConfig
from epi_ds.errors import RemedyError, UserError
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import MethodSection, Recipe
from epi_ds.recipe.sources import EvaluationData
from epi_ds.train.metrics import MetricsWriter, read_metrics
from epi_ds.train.progress import ProgressDisplay
from epi_ds.train.resume import DATA, MARKER, check_data, check_steps, find_resume, marker_of
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.settings import END, changes_since, end_of
from epi_ds.train.stages import StageSpan
from tests.support.ranks import run_ranks
from tests.support.tags import flip_bit, make_checkpoint

RECIPE = parse_recipe(
    {"model": {"path": "m"}, "stages": [{"name": "a", "data": {"skill": "logic", "rows": 8}}], "output": "o"},
    place="test",
)


def test_metrics_are_cut_back_on_resume_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, resume_step=None)
    for step in range(6):
        writer.write("step", step=step, stage="a", loss=1.0 / (step + 1))
    writer.close()
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [line["step"] for line in read_metrics(path)] == list(range(6))
    writer = MetricsWriter(path, resume_step=3)
    writer.write("step", step=4, stage="a", loss=9.0)
    writer.close()
    lines = list(read_metrics(path))
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[2]["loss"] == 1 / 3
    MetricsWriter(path, resume_step=None).close()
    assert list(read_metrics(path)) == []
    assert list(read_metrics(tmp_path / "absent.jsonl")) == []


def test_a_log_hears_of_an_evaluation_as_of_steps() -> None:
    said = io.StringIO()
    with ProgressDisplay(Console(file=said, width=80), total_steps=2) as progress:
        progress.evaluation("code", done=0, total=96, seconds=0.2)
        # Too soon after the line before.
        progress.evaluation("code", done=32, total=96, seconds=1.0)
        progress.step(2, stage="a", loss=1.0, isolated_share=0.1)
    assert said.getvalue().splitlines() == [
        "evaluating code: 0/96 rows, 0 s",
        "step 2/2  a  loss 1.000  isolated 10.00%",
    ]
    # All ranks but one have no console.
    ProgressDisplay(None, total_steps=2).evaluation("code", done=0, total=96, seconds=0.2)


def checkpoint(folder: RunFolder, step: int, recipe: Recipe = RECIPE) -> Path:
    files = {MARKER: json.dumps(marker_of(recipe))}
    return make_checkpoint(folder.checkpoints / f"checkpoint-{step}", step=step, files=files)


def resume_step(recipe: Recipe, root: str, tag: str) -> int | str:
    """The step that a rank would continue from, or what it says instead."""
    try:
        found = find_resume(recipe, RunFolder(Path(root)), tag=tag)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return 0 if found is None else found.step


@pytest.mark.slow
def test_the_newest_whole_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert run_ranks(resume_step, 2, RECIPE, str(tmp_path), "auto") == [0, 0]
    for step in (9, 10, 11):
        checkpoint(folder, step)
    flip_bit(checkpoint(folder, 12) / MARKER)
    (folder.checkpoints / "checkpoint-13").mkdir()
    assert run_ranks(resume_step, 2, RECIPE, str(tmp_path), "auto") == [11, 11]
    assert run_ranks(resume_step, 2, RECIPE, str(tmp_path), "step:9") == [9, 9]
    assert run_ranks(resume_step, 2, RECIPE, str(tmp_path), "checkpoint-10") == [10, 10]
    (said, also) = run_ranks(resume_step, 2, RECIPE, str(tmp_path), "step:12")
    assert said == also
    assert "checkpoint-12/recipe.json is damaged" in str(said)
    assert "there are steps 9, 10, 11, 12" in str(run_ranks(resume_step, 2, RECIPE, str(tmp_path), "step:8")[1])


def test_an_output_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=f"output {tmp_path / place} cannot be a folder, a file is in its place"):
            RunFolder(tmp_path / place).clear()
    RunFolder(tmp_path / "new" / "run").prepare()
    assert list((tmp_path / "new" / "run").iterdir()) == []

    def fail(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with pytest.raises(RemedyError, match=r"cannot be written \(\[Errno 30\] Read-only file system\); make room"):
        RunFolder(tmp_path).prepare()


def test_clearing_a_run_leaves_what_it_did_not_write(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 2)
    for path in (folder.metrics, folder.report, tmp_path / "mine.txt", tmp_path / "base" / "weights"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    folder.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mine.txt"]


@pytest.mark.slow
def test_a_resume_that_would_train_other_rows_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 3)
    other = RECIPE.model_copy(update={"train": {"seed": 5}})
    (said, also) = run_ranks(resume_step, 2, other, str(tmp_path), "auto")
    assert said == also
    assert "train other rows" in str(said)
    assert "train.seed was 42, is 5" in str(said)
    # What does not change the rows may change, and so may how they are dealt to ranks.
    for harmless in (
        {"save_steps": 5, "logging_steps": 2, "report_to": "tensorboard"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    ):
        changed = RECIPE.model_copy(update={"train": harmless})
        assert run_ranks(resume_step, 1, changed, str(tmp_path), "auto") == [3]


def test_a_key_that_a_marker_lacks_means_its_default(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    marker = marker_of(RECIPE)
    del marker["model"]["attn_implementation"], marker["stages"][0]["epochs"], marker["stages"][0]["data"]["subset"]
    make_checkpoint(folder.checkpoints / "checkpoint-3", step=3, files={MARKER: json.dumps(marker)})
    assert run_ranks(resume_step, 1, RECIPE, str(tmp_path), "auto") == [3]
    # So does an argument that is given as what it is anyway.
    same = RECIPE.model_copy(update={"train": {"seed": 42, "packing": False, "bf16": False}})
    assert run_ranks(resume_step, 1, same, str(tmp_path), "auto") == [3]
    stages = (RECIPE.stages[0].model_copy(update={"epochs": 2}),)
    (said,) = run_ranks(resume_step, 1, RECIPE.model_copy(update={"stages": stages}), str(tmp_path), "auto")
    assert "stages.a.epochs was 1, is 2" in str(said)


def with_ratio(ratio: float) -> Recipe:
    method = RECIPE.method.model_copy(update={"epi": EPIConfig(ratio=ratio)})
    return RECIPE.model_copy(update={"method": method})


def test_a_run_that_has_ended_says_so_and_refuses_other_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    last = open_checkpoint(checkpoint(folder, 4))
    writer = MetricsWriter(folder.metrics, resume_step=None)
    folder.recipe.write_text(RECIPE.model_dump_json())
    writer.write("summary", step=4, stage="a")
    folder.export.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (folder.export / name).touch()
    assert end_of(folder, with_ratio(0.2), resume=last) is None
    assert changes_since(folder, with_ratio(0.2)) == [("method.epi.ratio", 0.01, 0.2)]
    writer.write(END, step=4, stage="a")
    writer.close()
    assert "4 steps" in str(end_of(folder, RECIPE, resume=last))
    # How it is watched, and on how many ranks, is no setting of what was trained.
    watched = RECIPE.model_copy(update={"train": {"logging_steps": 7}, "ranks": 3})
    assert end_of(folder, watched, resume=last) is not None
    with pytest.raises(UserError, match=r"method\.epi\.ratio was 0\.01, is 0\.2"):
        end_of(folder, with_ratio(0.2), resume=last)
    # What was taken away is made again.
    assert end_of(folder, RECIPE, resume=open_checkpoint(checkpoint(folder, 2))) is None
    (folder.export / "config.json").unlink()
    assert end_of(folder, RECIPE, resume=last) is None


def test_a_recipe_of_an_earlier_release_differs_in_no_setting_that_came_later(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tasks = {"chat": EvaluationData(skill="code", rows=2)}
    recipe = RECIPE.model_copy(update={"evaluation": RECIPE.evaluation.model_copy(update={"tasks": tasks})})
    saved = json.loads(recipe.model_dump_json())
    del saved["evaluation"]["weights"], saved["method"]["epi"]["hysteresis"], saved["stages"][0]["moments"]
    del saved["evaluation"]["tasks"]["chat"]["where"]
    folder.recipe.write_text(json.dumps(saved))
    assert changes_since(folder, recipe) == []


def test_metrics_are_strict_json_whatever_a_loss_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, resume_step=None)
    values = {"loss": float("nan"), "grad_norm": float("inf"), "fine": 0.5, "scores": {"a": [1.0, float("-inf")]}}
    writer.write("step", step=1, stage="a", **values)
    writer.close()

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["fine"], line["scores"]) == (None, None, 0.5, {"a": [1.0, None]})
    assert line["not_finite"] == {"loss": "nan", "grad_norm": "inf", "scores": "{'a': [1.0, -inf]}"}


def test_a_resume_knows_its_data(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    saved = [{"digests": ["aa"], "rows": 8}]
    path = checkpoint(folder, 3)
    (path / MARKER).write_text(json.dumps(marker_of(RECIPE, saved)))
    found = open_checkpoint(path)
    check_data(found, RECIPE, saved)
    with pytest.raises(UserError, match=r"the data of stage a: it had 8 rows, has 9"):
        check_data(found, RECIPE, [{"digests": ["bb"], "rows": 9}])
    with pytest.raises(UserError, match=r"the data of stage a: it had 8 rows, has 8, whose content is another"):
        check_data(found, RECIPE, [{"digests": ["bb"], "rows": 8}])
    # It is enough to look at that.
    check_steps(found, [StageSpan("a", 0, 99)], global_batch=1)
    keeps = RECIPE.model_copy(update={"method": MethodSection.model_validate({"keep": {"self": 4}})})
    own = {"digests": ["cc"], "rows": 4}
    (path / MARKER).write_text(json.dumps(marker_of(keeps, [*saved, own])))
    check_data(found, keeps, [*saved, own])
    with pytest.raises(UserError, match=r"the data of what is kept, source 1: it had 4 rows, has 4, whose content"):
        check_data(found, keeps, [*saved, {**own, "digests": ["dd"]}])
    # A release of before said nothing of it.
    values = marker_of(RECIPE)
    del values[DATA]
    (path / MARKER).write_text(json.dumps(values))
    check_data(found, RECIPE, saved)
    # It was on the way to so many steps: other rows show where they fill others.
    (path / TRAINER_STATE).write_text(json.dumps({"max_steps": 8}))
    check_steps(found, [StageSpan("a", 0, 6), StageSpan("b", 6, 8)], global_batch=1)
    check_steps(found, [StageSpan("a", 0, 4)], global_batch=2)
    with pytest.raises(UserError, match=r"on the way to 8 steps, and the rows now fill 7 \(a 5, b 2\): a file has"):
        check_steps(found, [StageSpan("a", 0, 5), StageSpan("b", 5, 7)], global_batch=1)
