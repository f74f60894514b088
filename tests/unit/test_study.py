"""Studies: what they say, the digests of their cells, and the lines of their results."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from epi_ds.errors import RemedyError, UserError
from epi_ds.study.cells import (
    Cell,
    WorkFolder,
    base_settings,
    cells_of,
    digest_of,
    merge_of,
    own_rows_of,
    recipe_of,
    run_of,
    validated,
)
from epi_ds.study.loading import load_study, shipped_names
from epi_ds.study.models import Protocol, Study
from epi_ds.study.result_lines import Result, Status, append_result, check_writable, newest, read_results
from epi_ds.study.run import pending
from epi_ds.study.scoring import scores_of

STUDY: dict[str, Any] = {
    "name": "mine",
    "protocol": "one_new_task",
    "base": {"skills": ["code", "logic", "dialogue"], "pretrain": {"steps": 10}},
    "recipe": {"train": {"learning_rate": 1e-3, "max_length": 64}, "method": {"epi": {"policy": "none"}}},
    "targets": {
        "code": [{"name": "code", "data": {"skill": "code", "rows": 64}}],
        "instruct": [{"name": "new", "data": {"skill": "instruct", "rows": 64}}],
    },
    "seeds": {"choose": [0, 1], "report": [2]},
    "arms": {
        "full_lr_1": {},
        "full_lr_2": {"train.learning_rate": 5e-4},
        "own_rows": {"method.keep": {"self": {"rows": 32, "temperature": 0.9}, "importance": False, "replay": 0.1}},
        "replay": {"method.keep": {"data": {"base_skills": {"rows": 32}}, "importance": False, "replay": 0.1}},
    },
    "frontier": ["full_lr_1", "full_lr_2"],
}
WORK = WorkFolder(Path("/work_folder"))


def study_of(**changes: Any) -> Study:
    return Study.model_validate({**copy.deepcopy(STUDY), **changes})


def refused(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    with pytest.raises(UserError) as error:
        load_study(str(path))
    return str(error.value)


# --- studies ---


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_studies_are_valid_and_so_is_every_cell(name: str) -> None:
    study = load_study(name).study
    assert study.name == name
    digests = [digest_of(study, cell) for cell in cells_of(study)]
    assert len(set(digests)) == len(digests), "two arms are the same"


def test_a_base_that_there_is_keeps_rows_of_files_that_tables_do_without(tmp_path: Path) -> None:
    rows = {"path": "not/here/text.jsonl", "metric": "loss"}
    study = study_of(base={"path": "a_model", "kept": {"text": rows}})
    cell = Cell("full_lr_1", 0, "code")
    assert study.kept_tasks("code") == ("text",)
    several = study.model_copy(update={"ranks": 4, "base": study.base.model_copy(update={"dtype": "bfloat16"})})
    assert recipe_of(several, cell, WORK)["ranks"] == 4
    assert recipe_of(several, cell, WORK)["model"]["dtype"] == "bfloat16"
    assert recipe_of(study, cell, WORK)["evaluation"] == {"skills": [], "tasks": {"text": rows}}
    with pytest.raises(UserError, match=r"there is no data file not/here/text\.jsonl"):
        validated(study, cell, WORK)
    others = study_of(base={"path": "a_model", "kept": {"text": {**rows, "rows": 8}}})
    assert digest_of(study, cell) != digest_of(others, cell)


def test_problems_are_told_at_once_with_the_nearest_names(tmp_path: Path) -> None:
    told = refused(tmp_path, frontir=[], base={"skills": ["logik"], "pretrain": {"steps": 1, "batchsize": 3}})
    assert "3 problems in the study" in told
    assert "frontir: unknown key; did you mean 'frontier'?" in told
    assert "there is no skill 'logik'; did you mean 'logic'?" in told
    assert "base.pretrain.batchsize: unknown key; did you mean 'batch_size'?" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"frontier": ["full_lr_1", "full_lr2"]}, "did you mean 'full_lr_2'?"),
        ({"best": "own_rows"}, "own_rows is not in frontier"),
        ({"sweeps": {"own": ["own_rows", "full_lr_1"]}}, "at least three strengths"),
        ({"primary": {"sweep": "own", "level": 0.8}}, "primary names the sweep 'own'"),
        ({"seeds": {"choose": [0], "report": [0]}}, "would confirm what was chosen on it"),
        ({"recipe": {"output": "x"}}, "output is the study's to give"),
        ({"protocol": "stages"}, "an order has two or more"),
        ({"targets": {}}, "at least one target"),
        ({"base": {"skills": ["code"], "pretrain": {"steps": 1}}}, "nothing is left that could be kept"),
        ({"base": {"skills": ["code"]}}, "neither is given"),
        ({"rates": {"plain": ["full_lr_1", "full_lr_2"]}}, "at least three rates"),
        ({"rates": {"plain": ["full_lr_1", "full_lr_2", "full_lr_3"]}}, "rates.plain names the arm 'full_lr_3'"),
        ({"arms": {**STUDY["arms"], "wise_ft": {"merge": 1}}}, "a share of what was trained lies in (0, 1)"),
        ({"arms": {**STUDY["arms"], "wise_ft": {"merge": True}}}, "arms.wise_ft.merge is True"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert told in refused(tmp_path, **changes)


def test_what_is_no_study_is_said() -> None:
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        load_study("smok")
    with pytest.raises(UserError, match=r"there is no study file nowhere\.yaml"):
        load_study("nowhere.yaml")
    with pytest.raises(UserError, match="has no arm 'own_row'; did you mean 'own_rows'"):
        list(cells_of(study_of(), arms=["own_row"]))
    with pytest.raises(UserError, match="has no target 'cod'; did you mean 'code'"):
        list(cells_of(study_of(), targets=["cod"]))
    assert list(cells_of(study_of(), arms=["replay"], seeds=[1], targets=["code"])) == [Cell("replay", 1, "code")]
    with pytest.raises(UserError, match="has no seed 7"):
        list(cells_of(study_of(), seeds=[7]))


# --- cells ---


def test_a_cell_is_a_recipe_of_the_arm_the_seed_and_the_target() -> None:
    study = study_of()
    values = recipe_of(study, Cell("full_lr_2", 1, "instruct"), WORK)
    assert values["train"] == {"learning_rate": 5e-4, "max_length": 64, "seed": 1}
    assert values["evaluation"]["skills"] == ["code", "logic", "dialogue"]
    assert study.recipe["train"] == STUDY["recipe"]["train"], "the study's own was changed"
    # What is trained is neither known to the base nor kept.
    assert base_settings(study, Cell("full_lr_1", 0, "code"))["skills"] == ["logic", "dialogue"]
    replayed = recipe_of(study, Cell("replay", 0, "code"), WORK)["method"]["keep"]["data"]
    assert replayed == [{"skill": "logic", "rows": 32}, {"skill": "dialogue", "rows": 32}]


def test_bases_and_own_rows_are_shared_by_what_they_depend_on() -> None:
    study = study_of()

    def own_rows(seed: int, target: str) -> Path | None:
        return own_rows_of(recipe_of(study, Cell("own_rows", seed, target), WORK))

    assert own_rows_of(recipe_of(study, Cell("replay", 0, "code"), WORK)) is None
    assert len({own_rows(seed, target) for seed in (0, 1) for target in study.targets}) == 4
    assert WORK.base(study, Cell("replay", 0, "code")) == WORK.base(study, Cell("own_rows", 0, "code"))
    assert WORK.base(study, Cell("replay", 0, "code")) != WORK.base(study, Cell("replay", 1, "code"))
    under_stages = {**STUDY["targets"], "code": [{**STUDY["targets"]["code"][0], "name": str(i)} for i in (1, 2)]}
    both = study_of(protocol="stages", targets={"code": under_stages["code"]})
    assert both.pretrained_skills("code") == ("code", "logic", "dialogue")
    assert both.kept_skills("code") == ("logic", "dialogue")


def test_a_digest_changes_with_any_setting_and_with_no_path() -> None:
    cell = Cell("own_rows", 0, "code")
    digest = digest_of(study_of(), cell)
    assert digest_of(study_of(name="other", best="full_lr_2"), cell) == digest
    # Defaults are settings: to write one down changes nothing.
    same = copy.deepcopy(STUDY["arms"])
    same["own_rows"]["method.keep.replay_loss"] = "share"
    assert digest_of(study_of(arms=same), cell) == digest
    others = {digest, digest_of(study_of(), Cell("own_rows", 1, "code"))}
    for key, value in {
        "train.learning_rate": 2e-3,
        "train.weight_decay": 0.1,
        "method.keep.self": 33,
        "method.epi.anchor": {"strength": 2},
        "evaluation.rows": 65,
        "stages.0.data.rows": 65,
    }.items():
        changed = copy.deepcopy(STUDY["arms"])
        changed["own_rows"][key] = value
        others.add(digest_of(study_of(arms=changed), cell))
    base = {"skills": ["code", "logic", "dialogue"], "pretrain": {"steps": 11}}
    others.add(digest_of(study_of(base=base), cell))
    assert len(others) == 9


def test_a_merge_is_of_an_arm_s_run_and_in_its_digest_alone() -> None:
    study = study_of(arms={**STUDY["arms"], "wise_ft": {"train.learning_rate": 5e-4, "merge": 0.5}})
    plain, merged = Cell("full_lr_2", 0, "code"), Cell("wise_ft", 0, "code")
    assert merge_of(study, plain) is None
    assert merge_of(study, merged) == 0.5
    assert {**recipe_of(study, merged, WORK), "output": 0} == {**recipe_of(study, plain, WORK), "output": 0}
    assert digest_of(study, merged) != digest_of(study, plain)
    orders = {"order": [{**STUDY["targets"]["code"][0], "name": str(number)} for number in (1, 2)]}
    with pytest.raises(ValidationError, match="each has an end of its own"):
        study_of(protocol="stages", targets=orders, arms=study.arms)


def test_a_run_with_importance_leaves_its_last_checkpoint() -> None:
    arms = {
        **STUDY["arms"],
        "epi": {"method.epi": {"policy": "evolving", "refresh_interval": 2}},
        "adam": {"method.epi": {"policy": "evolving", "refresh_interval": 2, "state": "adam", "apply": "update"}},
        "random": {"method.epi": {"policy": "random"}},
    }
    study = study_of(arms=arms, recipe={**STUDY["recipe"], "train": {"save_strategy": "no"}})
    found = {arm: run_of(study, Cell(arm, 0, "instruct"), WORK)["train"] for arm in ("full_lr_1", *list(arms)[-3:])}
    assert found["epi"]["save_strategy"] == "steps"
    assert {arm for arm, train in found.items() if train["save_strategy"] == "no"} == {"full_lr_1", "adam", "random"}
    # What the study says of saving stands.
    saving = study_of(arms=arms, recipe={**STUDY["recipe"], "train": {"save_steps": 3}})
    assert run_of(saving, Cell("epi", 0, "instruct"), WORK)["train"]["save_steps"] == 3


def test_a_wrong_key_of_an_arm_names_the_arm() -> None:
    study = study_of(arms={**STUDY["arms"], "full_lr_1": {"method.epi.ratioo": 0.1}})
    with pytest.raises(UserError, match=r"arm full_lr_1 of the study mine:\n.*did you mean 'ratio'"):
        digest_of(study, Cell("full_lr_1", 0, "code"))


# --- results ---


def result_of(cell: Cell, **changes: Any) -> Result:
    known = {"study": "mine", "protocol": "one_new_task", "seconds": 1.5, "digest": "d", "version": "0", "status": "ok"}
    return Result.model_validate({**known, "new": 0.5, "kept": 0.25, **cell._asdict(), **changes})


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "mine.jsonl"
    assert read_results(file) == []
    written = [
        result_of(Cell("a", 0, "t"), path=[{"step": 0, "new": 0.1, "kept": 0.9}], scores={"code": (0.1, 0.2)}),
        result_of(Cell("a", 1, "t"), flips={"code": {"right_to_wrong": 0, "wrong_to_right": 0.125}}),
        result_of(Cell("b", 0, "t"), status="failed", new=None, kept=None, error="boom\nbang"),
    ]
    for one in written:
        append_result(file, one)
    assert read_results(file) == written
    assert len(file.read_text().splitlines()) == len(written)


def test_a_line_that_was_cut_is_told_and_gone_with_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mine.jsonl"
    first, second = result_of(Cell("a", 0, "t")), result_of(Cell("b", 0, "t"))
    append_result(file, first)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    assert read_results(file) == [first]
    assert f"line 2 of {file} was cut" in caplog.text
    append_result(file, second)
    assert read_results(file) == [first, second]


def test_what_is_no_result_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    append_result(file, result_of(Cell("a", 0, "t")))
    file.write_text(file.read_text() + file.read_text().replace('"kept":0.25', '"kept":1.25'))
    file.write_text(file.read_text().replace('"kept": 0.25', '"kept": 1.25', 1))
    with pytest.raises(UserError, match=r"problem in line 1 of .*mine.jsonl:\n  - kept: .*1\.25"):
        read_results(file)
    with pytest.raises(ValueError, match="new or kept is missing"):
        result_of(Cell("a", 0, "t"), new=None)


def test_results_that_cannot_be_written_are_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"results cannot be written to .*/file/tiny\.jsonl: .*--results"):
        check_writable(tmp_path / "file" / "tiny.jsonl")
    check_writable(tmp_path / "new" / "tiny.jsonl")


def test_the_last_line_of_the_present_settings_counts(tmp_path: Path) -> None:
    study, file = study_of(), tmp_path / "mine.jsonl"
    good, failed, other, never = list(cells_of(study, seeds=[0]))[:4]
    digests = {cell: digest_of(study, cell) for cell in (good, failed, other)}
    append_result(file, result_of(good, digest=digests[good], status="failed", new=None, kept=None))
    append_result(file, result_of(good, digest=digests[good]))
    append_result(file, result_of(failed, digest=digests[failed], status="failed", new=None, kept=None))
    append_result(file, result_of(other, digest="of other settings"))
    found = newest(read_results(file), digests)
    assert {cell: one.status for cell, one in found.items()} == {good: Status.OK, failed: Status.FAILED}
    assert pending(study, [good, failed, other, never], file) == [failed, other, never]


def test_committed_results_are_read() -> None:
    for name in shipped_names():
        found = load_study(name)
        for one in read_results(found.results):
            assert one.study == name
            assert one.protocol is found.study.protocol
            assert one.arm
            assert one.seconds > 0
            assert len(one.digest) == 64


# --- scores ---


def evaluation(step: int, *, stage_ended: bool = True, **values: float) -> dict[str, Any]:
    scores = {name.replace("base_", "base/"): {"value": v, "higher_is_better": True} for name, v in values.items()}
    return {"event": "evaluation", "step": step, "stage_ended": stage_ended, "scores": scores}


def test_answers_that_flipped_are_told_apart_from_scores() -> None:
    lines = [evaluation(0, new=0.0, code=0.5, base_logic=0.5), evaluation(9, new=0.75, code=0.5, base_logic=0.0)]
    for line, rows in zip(lines, (("0000", "1100", "0101"), ("1110", "1010", "0000")), strict=True):
        for score, solved in zip(line["scores"].values(), rows, strict=True):
            score["solved"] = solved

    def flips() -> dict[str, tuple[float, float]]:
        found = scores_of(lines, protocol=Protocol.ONE_NEW_TASK, stages=["new"], kept=["code", "logic"]).flips
        return {name: (one.right_to_wrong, one.wrong_to_right) for name, one in found.items()}

    # Code's score stands still, and half of its answers changed.
    assert flips() == {"new": (0.0, 0.75), "code": (0.25, 0.25), "logic": (0.5, 0.0)}
    lines[1]["scores"]["code"]["solved"] = "101"
    with pytest.raises(RemedyError, match="4 test rows before training and 3 at its end"):
        flips()
    # As runs of earlier commits wrote them.
    del lines[0]["scores"]["code"]["solved"]
    assert list(flips()) == ["new", "logic"]


def test_scores_of_one_new_task() -> None:
    found = scores_of(
        [
            {"event": "run"},
            evaluation(0, new=0.0, code=1.0, base_logic=0.5),
            evaluation(5, stage_ended=False, new=0.4, code=0.8, base_logic=0.6),
            evaluation(9, new=0.9, code=0.5, base_logic=0.1),
        ],
        protocol=Protocol.ONE_NEW_TASK,
        stages=["new"],
        kept=["code", "logic"],
    )
    assert (found.new, found.new_before, found.kept_before) == (0.9, 0.0, 0.75)
    assert found.kept == pytest.approx(0.3)
    assert [tuple(one.model_dump().values()) for one in found.path] == [
        (0, 0.0, 0.75),
        (5, 0.4, pytest.approx(0.7)),
        (9, 0.9, pytest.approx(0.3)),
    ]
    assert found.forgetting_rate == pytest.approx((0.5 + 0.8) / 2)
    assert found.backward_transfer is None
    assert found.scores == {"new": (0.0, 0.9), "code": (1.0, 0.5), "logic": (0.5, 0.1)}


def test_losses_count_as_likelihoods() -> None:
    """One halves what the model gives a token that it knew, the other one is not better than before it was trained."""
    before, after = (evaluation(step, new=0.0, code=0.5, text=0.0, chat=0.0) for step in (0, 9))
    losses = {"new": (3.0, 1.0), "text": (2.0, 2.0 + math.log(2)), "chat": (1.5, 1.0)}
    for name, values in losses.items():
        for line, value in zip((before, after), values, strict=True):
            line["scores"][name] = {"value": value, "higher_is_better": False}
    kept = ["code", "text", "chat"]
    found = scores_of([before, after], protocol=Protocol.ONE_NEW_TASK, stages=["new"], kept=kept)
    assert (found.new_before, found.new) == pytest.approx((math.exp(-3), math.exp(-1)))
    assert (found.kept_before, found.kept) == pytest.approx(((0.5 + 1 + 1) / 3, (0.5 + 0.5 + 1) / 3))
    assert found.path[-1].kept == found.kept
    assert found.forgetting_rate == pytest.approx((0 + 0.5 + 0) / 3)
    assert {name: found.scores[name] for name in losses} == losses


def test_scores_of_stages() -> None:
    found = scores_of(
        [
            evaluation(0, one=0.0, two=0.2, code=1.0),
            evaluation(4, one=0.8, two=0.1, code=0.9),
            evaluation(8, one=0.6, two=0.7, code=0.4),
        ],
        protocol=Protocol.STAGES,
        stages=["one", "two"],
        kept=["code"],
    )
    assert found.new == pytest.approx((0.8 + 0.7) / 2)
    assert found.kept == pytest.approx((0.6 + 0.4) / 2)
    assert found.backward_transfer == pytest.approx(-0.2)
    assert found.path == ()


def test_a_run_without_its_last_evaluation_has_no_score() -> None:
    lines = [evaluation(0, new=0.0, code=1.0), evaluation(5, stage_ended=False, new=0.4, code=0.8)]
    with pytest.raises(RemedyError, match="1 evaluations of the 2"):
        scores_of(lines, protocol=Protocol.ONE_NEW_TASK, stages=["new"], kept=["code"])
    with pytest.raises(RemedyError, match="logic was not scored"):
        scores_of([*lines, lines[0]], protocol=Protocol.ONE_NEW_TASK, stages=["new"], kept=["logic"])
