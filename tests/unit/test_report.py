"""The page of a run: score tables, what was learnt and kept, settings, what went wrong, and hostile names."""

from __future__ import annotations

import json
import re
import xml.dom.minidom
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from epi_ds.cli.report import report
from epi_ds.defaults import settings_in
from epi_ds.errors import UserError
from epi_ds.inspect.displacement import displacement_by_layer
from epi_ds.own_rows.file import write_rows, written_in
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.report.charts import LineChart
from epi_ds.report.effort import effort_of
from epi_ds.report.findings import Level, findings_of
from epi_ds.report.outcome import outcome_of, side_by_side
from epi_ds.report.page import charts_of, write_report
from epi_ds.report.run import Audit, Run, names_of
from epi_ds.report.scores import TaskScore, score_history, score_table
from tests.support.run_lines import LINES, evaluation, run_of

HOSTILE = "b<script>alert(1)</script>\"'&"


def page_of(folder: Path, *runs: Run, title: str = "mine") -> str:
    write_report(runs, folder / "page.html", title=title)
    return (folder / "page.html").read_text()


def text_of(page: str) -> str:
    """What a reader sees of a page, on one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", body)))


def test_forgetting_is_the_best_earlier_score_minus_the_last() -> None:
    table = score_table(LINES)
    assert table.columns == ("before", "after a", "after b")
    assert table.stages == (None, "a", "b")
    assert {row.name: row.forgetting for row in table.rows} == {"a": 0.25, "b": -1.0, "nll": 0.5}
    # Losses are no accuracies, and are left out of the mean.
    assert table.mean_forgetting == pytest.approx((0.25 - 1.0) / 2)


def test_scores_within_stages_count_and_have_a_table_of_their_own(tmp_path: Path) -> None:
    within = {**evaluation(3, "b", a=1.0, b=0.5, nll=0.5), "stage_ended": False}
    lines = [*LINES[:-1], within, LINES[-1]]
    table = score_table(lines)
    assert table.columns == ("before", "after a", "after b")
    # The best of all was within the stage.
    assert {row.name: row.forgetting for row in table.rows} == {"a": 0.5, "b": -0.5, "nll": 1.0}
    assert score_history(lines).columns == ("before", "after a", "b, step 3", "after b")
    assert [row.values[2] for row in score_history(lines).rows] == [1.0, 0.5, 0.5]
    # Of a run that has come no further.
    assert score_table(lines[:-1]).columns == ("before", "after a", "b, step 3")
    for written, has_history in ((LINES, False), (lines, True)):
        assert ("All 4 evaluations" in page_of(tmp_path, run_of(written))) is has_history


def test_the_matrix_marks_the_task_whose_stage_has_just_ended(tmp_path: Path) -> None:
    page = page_of(tmp_path, run_of(LINES))
    assert re.findall(r'class="score own"[^>]*>([^<]*)<', page) == ["75.0%", "100.0%"]
    # Shares of the full colour, which is 45 %: of losses there is none.
    assert re.findall(r'class="score(?: own)?" style="--v: (\d+)%', page)[:9] == "11 34 22 0 0 45 0 0 0".split()
    row = re.search(r"a 25\.0% 75\.0% 50\.0% \+25\.0 points", text_of(page))
    assert row is not None


def test_what_was_to_be_kept_is_reported_first(tmp_path: Path) -> None:
    lines = [
        LINES[0],
        evaluation(0, "start", a=0.0, **{"base/logic": 0.5}),
        evaluation(2, "a", a=0.75, **{"base/logic": 0.25}),
    ]
    for line, loss in zip(lines[1:], (1.5, 1.75), strict=True):
        line["scores"]["base/own_rows"] = {"value": loss, "num_rows": 4, "higher_is_better": False}
    table = score_table(lines)
    assert [row.name for row in table.rows] == ["base/logic", "base/own_rows", "a"]
    assert table.kept_told == "25.0%, loss +0.250"
    assert score_table(LINES).kept_told is None
    assert "Of what is to be kept: 25.0%, loss +0.250." in text_of(page_of(tmp_path, run_of(lines)))
    outcome = outcome_of(run_of(lines))
    assert outcome.learnt_mean == (1, 0.0, 0.75)
    assert outcome.kept_mean == (1, 0.5, 0.25)


def test_learnt_and_kept_say_which_rows_turned(tmp_path: Path) -> None:
    before, after = (evaluation(step, "a", a=0.5, held=0.5) for step in (0, 4))
    before["scores"]["held"]["solved"], after["scores"]["held"]["solved"] = "0101", "0011"
    outcome = outcome_of(run_of([LINES[0], before, after]))
    assert [change.flips() for change in (*outcome.learnt, *outcome.kept)] == [None, (1, 1)]
    assert TaskScore(0.5, 4, True, None).standard_error == 0.25
    assert TaskScore(1.5, 4, False, None).standard_error is None
    # Of a run that was evaluated once there is nothing to compare.
    once = outcome_of(run_of([LINES[0], before]))
    assert (once.learnt_mean, once.learnt[0].difference) == (None, None)
    assert "No task of a stage has an accuracy before and after" in page_of(tmp_path, run_of([LINES[0], before]))


def test_a_page_is_the_same_every_time_and_no_name_is_markup(tmp_path: Path) -> None:
    # Read back from a file, so that nothing is escaped by being refused.
    text = json.dumps([*LINES, {**LINES[2], "step": 4, "not_finite": {"loss": HOSTILE}}])
    lines = json.loads(text.replace('"b"', json.dumps(HOSTILE)).replace('"x"', json.dumps(HOSTILE)))
    lines[0]["stages"] = {"a": [0, 2], HOSTILE: [2, 4]}
    lines[0]["changed"] = [{"key": HOSTILE, "before": HOSTILE, "now": [HOSTILE]}]
    lines[0]["environment"] = {HOSTILE: HOSTILE}
    runs = [
        run_of(lines, HOSTILE, displacement={HOSTILE: 0.1}, audit=Audit(HOSTILE, HOSTILE, is_sound=False)),
        run_of(lines, "other"),
    ]
    pages = [page_of(tmp_path, *runs, title=HOSTILE) for _ in range(2)]
    assert pages[0] == pages[1]
    assert "<script>alert" not in pages[0]
    assert pages[0].count("<script>") == 1
    # Well-formed as a whole, names in attributes and titles included.
    for svg in re.findall(r"<svg.*?</svg>", pages[0], flags=re.DOTALL):
        xml.dom.minidom.parseString(svg)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", pages[0])
    assert "http" not in pages[0].replace('http-equiv="Content-Security-Policy"', "")


def test_there_is_nothing_to_report_where_no_run_started() -> None:
    with pytest.raises(UserError, match="nothing to report: runs/mine holds no metrics of a run"):
        run_of(LINES[1:])


def test_metrics_of_earlier_releases_say_what_they_do_not_know(tmp_path: Path) -> None:
    page = text_of(page_of(tmp_path, run_of(LINES)))
    for said in (
        "an earlier release wrote these metrics",
        "There were no two masks to compare",
        "Not measured",
        "step 3 of 4",
    ):
        assert said in page
    # Of a run that has only begun.
    assert "No step was logged yet" in text_of(page_of(tmp_path, run_of(LINES[:1])))


def test_settings_that_were_given_are_marked_and_defaults_are_not(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {
            "model": {"path": "m"},
            "stages": [{"name": "a", "data": {"skill": "logic", "rows": 8}}],
            "method": {"epi": {"ratio": 0.2, "anchor": {"strength": 2}}},
            "train": {"learning_rate": 1e-3},
            "output": "o",
        },
        place="test",
    )
    found = settings_in(Recipe, json.loads(recipe.model_dump_json()))
    given = {one.key: one.value for one in found if one.is_given}
    assert given == {
        "model.path": "m",
        "stages.a.name": "a",
        "stages.a.data.skill": "logic",
        "stages.a.data.rows": 8,
        "method.epi.ratio": 0.2,
        "method.epi.anchor.strength": 2.0,
        "train.learning_rate": 1e-3,
        "output": "o",
    }
    assert next(one for one in found if one.key == "method.epi.ema_decay").default == 0.99
    page = page_of(tmp_path, run_of(LINES, settings=found))
    assert "<td>method.epi.ratio</td><td><b>0.2</b></td>" in page
    assert "<td>method.epi.ema_decay</td><td>0.99</td>" in page
    assert f"{len(given)} of {len(found)}" in text_of(page)


def test_runs_side_by_side_differ_in_settings_and_scores(tmp_path: Path) -> None:
    def recipe(ratio: float, **train: float) -> list[Any]:
        values = {"model": {"path": "m"}, "output": "o", "method": {"epi": {"ratio": ratio}}, "train": train}
        return settings_in(Recipe, {**values, "stages": [{"name": "a", "data": {"skill": "logic"}}]})

    better = [*LINES[:-1], evaluation(4, "b", a=0.75, b=1.0, nll=1.25)]
    runs = [run_of(LINES, "one", settings=recipe(0.01)), run_of(better, "two", settings=recipe(0.2, seed=3))]
    rows = {row.name: row for row in side_by_side(runs)}
    assert rows["a"].cells[1] == (0.25, 0.75, 0.25)
    assert rows["nll"].cells[1] == (2.0, 1.25, -0.25)
    page = page_of(tmp_path, *runs, title="one against two")
    different = page[page.index("Where the runs differ") : page.index("What was given")]
    assert "<td>method.epi.ratio</td><td>0.01</td><td><b>0.2</b></td>" in different
    assert "<td>train.seed</td><td>\N{EN DASH}</td><td><b>3</b></td>" in different
    assert different.count("<tr>") == 1 + 2
    # A loss that fell is better, and so is an accuracy that rose.
    assert re.findall(r'<td class="(better|worse)">([^<]*)</td>', page)[:3] == [
        ("better", "+25.0 points"), ("better", "+25.0 points"), ("better", "\N{MINUS SIGN}0.250")
    ]  # fmt: skip
    assert charts_of(runs).plane is not None
    assert charts_of(runs[:1]).plane is None
    # One colour for one run, in every chart.
    assert {(s.name, s.look) for c in charts_of(runs).all if isinstance(c, LineChart) for s in c.series} == {
        ("one", 0), ("two", 1)
    }  # fmt: skip


def test_what_went_wrong_is_told_the_worst_first(tmp_path: Path) -> None:
    resume = {
        **LINES[0],
        "step": 2,
        "resumed": True,
        "changed": [{"key": "method.epi.ratio", "before": 0.1, "now": 0.2}],
    }
    lost = {**LINES[2], "step": 2, "loss": None, "not_finite": {"loss": "nan"}}
    save = {"event": "save", "step": 3, "stage": "b<", "seconds": 1.5, "failed": True}
    summary = {"event": "summary", "step": 4, "stage": "b<", "skipped_steps": 2, "memory_bytes": 8}
    few = {**LINES[4], "budget": 100}
    found = findings_of(run_of([*LINES[:4], few, lost, resume, *LINES[5:], save, summary]))
    assert [one.level for one in found] == [
        Level.WRONG,
        Level.WARNING,
        Level.WARNING,
        Level.WARNING,
        Level.WARNING,
        Level.NOTE,
    ]
    said = " ".join(one.said for one in found)
    for part in (
        "checkpoint of step 3",
        "2 of 4 steps were skipped",
        "loss was not a finite number at step once: step 2",
        "1 of 1 refreshes isolated less than half",
        "in force in 33% of the steps",
        "resumed after step 2 on 2 ranks, with other settings: method.epi.ratio was 0.1, is 0.2",
    ):
        assert part in said
    page = page_of(tmp_path, run_of([*LINES[:5], resume, *LINES[5:]]))
    assert "<td>method.epi.ratio</td><td>0.1</td><td>0.2</td>" in page
    assert "step 3 of 4" in findings_of(run_of(LINES))[0].said
    # Earlier releases said nothing of the machine, nor of the end.
    now = {**LINES[0], "environment": {"python": "3"}}
    for first, end, is_told in ((LINES[0], [], False), (now, [], True), (now, [{**summary, "event": "end"}], False)):
        told = findings_of(run_of([first, *LINES[1:], {**summary, "skipped_steps": 0}, *end]))
        assert any("not exported to its end" in one.said for one in told) is is_told


def test_time_is_told_by_what_it_went_into(tmp_path: Path) -> None:
    timed = [{**line, "seconds": 2.0} if line["event"] in ("step", "evaluation") else line for line in LINES]
    # One inside a step, and one between two stages, which is in no step.
    refreshes = [{**LINES[4], "step": step, "seconds": 0.5} for step in (2, 3)]
    save = {"event": "save", "step": 3, "stage": "b<", "seconds": 1.5}
    summary = {"event": "summary", "step": 4, "stage": "b<", "memory_bytes": 2_000_000, "peak_bytes": {"host": 3e9}}
    run = run_of([line for line in timed if line["event"] != "refresh"] + [*refreshes, save, summary])
    effort = effort_of(run)
    # Two of three steps were logged, which took as long each.
    assert {part.name: part.seconds for part in effort.parts} == {
        "steps": 5.5, "refreshes": 1.0, "evaluations": 6.0, "saves": 1.5
    }  # fmt: skip
    assert sum(part.share for part in effort.parts) == pytest.approx(1)
    assert (effort.is_estimate, effort.step_seconds) == (True, 2.0)
    assert "2 MB" in text_of(page_of(tmp_path, run))
    assert "peak memory , host 3 GB" in text_of(page_of(tmp_path, run))


def test_own_rows_are_told(tmp_path: Path) -> None:
    file = tmp_path / "own_rows.jsonl"

    def told() -> str:
        line = {"event": "own_rows", "step": 0, "stage": "start", **written_in(file)._asdict()}
        return text_of(page_of(tmp_path, run_of([line, *LINES])))

    found = {"left_out": {"empty": 0, "cut": 3, "repeated": 1}, "num_tokens": 900, "seconds": 4.5}
    write_rows(file, [{"text": "a"}, {"text": "b"}], settings={"rows": 5}, found={"rows": 2, **found})
    for said in ("2 of 5", "3 cut, 1 repeated", "900", "4.5 s, 200 tokens/s", str(file), written_in(file).sha256):
        assert said in told()
    # What a person puts there was counted by nobody.
    file.write_text('{"text": "a <b>"}\n\n')
    assert written_in(file)[:-1] == (1, None, None, None, None, None, True, str(file))
    assert "Given or edited by a person" in told()
    assert "tokens/s" not in told()


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert names_of([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert names_of([Path("x/a/run"), Path("x/b/run")]) == ["a/run", "b/run"]
    with pytest.raises(UserError, match="runs/a is given twice"):
        names_of([Path("runs/a"), Path("runs/a")])
    with pytest.raises(UserError, match="the page of 2 runs belongs to none of their folders; say where by -o"):
        report([tmp_path / "a", tmp_path / "b"])


def test_displacement_is_relative_to_the_length_of_a_layer(tmp_path: Path) -> None:
    weights = {"model.layers.0.a.weight": torch.full((4,), 2.0), "model.layers.0.b.weight": torch.zeros(3)}
    moved = {**weights, "model.layers.0.b.weight": torch.tensor([0.0, 3.0, 0.0]), "head.weight": torch.ones(2)}
    for name, tensors in (("before", weights), ("after", moved), ("other", {"x": torch.ones(1)})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert displacement_by_layer(tmp_path / "before", tmp_path / "after") == {"model.layers.0": 3 / 4}
    with pytest.raises(UserError, match="have no weights in common"):
        displacement_by_layer(tmp_path / "before", tmp_path / "other")
    # Without a finished run there is nothing to compare it with.
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="has exported no model yet that --base could be compared with"):
        report([tmp_path / "run"], base=tmp_path / "before")
