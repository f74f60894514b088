"""General ability in a run and of its export: one recipe with ``evaluation.lm_eval``, and ``epi-ds eval``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.recipes import RANKS, lines_of, write_recipe
from tests.support.forks import epi_ds
from tests.support.harness_tasks import ALL, write_tasks
from tests.support.processes import checked

pytestmark = pytest.mark.end_to_end

NAMES = [f"lm_eval/{name}" for name in ALL]


def write_chat(file: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"Here: {n}."}]}
        for n in range(5)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.mark.slow
def test_an_export_scores_what_its_run_scored_last(small_base: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    recipe = write_recipe(
        tmp_path,
        small_base,
        stages=[{"name": "a", "data": {"skill": "arithmetic", "rows": 24}, "learning_rate": 1e-2}],
        evaluation={
            "skills": ["dialogue"],
            "tasks": {"chat": {"path": str(write_chat(tmp_path / "chat.jsonl")), "metric": "loss"}},
            "rows": 4,
            "max_new_tokens": 4,
            "weights": "partitioned",
            "lm_eval": {"tasks": list(ALL), "include_path": str(tasks), "limit": 5},
        },
        method={"epi": {"ratio": 0.1, "refresh_interval": 2}},
    )
    told = checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    assert NAMES[0] in told
    run = tmp_path / "run"
    before, last = (line["scores"] for line in lines_of(run, "evaluation"))
    assert list(last) == ["a", "dialogue", "chat", *NAMES]
    assert all(name in (run / "report.html").read_text() for name in NAMES)
    options = ("--tasks", ",".join(ALL), "--include-path", str(tasks), "--limit", "5", "--batch-size", "8")
    output = checked(epi_ds("eval", str(run / "export"), *options, "--against", str(small_base), "--json"))
    found = json.loads(output.splitlines()[-1])
    for name in NAMES:
        assert found["tasks"][name] == last[name]
        assert found["against"]["tasks"][name] == before[name]
        assert found["difference"][name] == last[name]["value"] - before[name]["value"]
    assert any(found["difference"].values())
    by_recipe = ("--recipe", str(recipe), "--against", str(small_base), "--json")
    output = checked(epi_ds("eval", str(run / "export"), *by_recipe))
    found = json.loads(output.splitlines()[-1])
    # Whole weights here and partitioned ones there: losses are sums in another order.
    for scores, written in ((found["tasks"], last), (found["against"]["tasks"], before)):
        assert list(scores) == list(written)
        assert {name: one | {"value": 0} for name, one in scores.items()} == {
            name: one | {"value": 0} for name, one in written.items()
        }
        for name, one in scores.items():
            assert one["value"] == pytest.approx(written[name]["value"], rel=1e-6)
    assert found["difference"]["chat"] != 0
    shown = checked(epi_ds("eval", str(run / "export"), "--recipe", str(recipe), "--batch-size", "3"))
    assert "loss of a token" in shown


@pytest.mark.slow
def test_what_is_wrong_is_one_message(small_base: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    options = ("--include-path", str(tasks))
    unknown = checked(epi_ds("eval", str(small_base), "--tasks", "own_choises", *options), exit_code=2)
    assert unknown.splitlines() == [unknown.strip()]
    assert "is called 'own_choises' (nearest: own_choices" in unknown
    absent = checked(epi_ds("eval", str(small_base), "--tasks", "piqa"), exit_code=1)
    assert "error: the rows of task piqa would have to be fetched, and the hub cannot be reached" in absent
    nothing = checked(epi_ds("eval", str(tmp_path / "nothing"), "--tasks", ALL[0], *options), exit_code=2)
    assert "error: FOLDER" in nothing
    neither = checked(epi_ds("eval", str(small_base)), exit_code=2)
    assert "(--recipe) or by tasks of lm-evaluation-harness (--tasks), and neither is given" in neither
    recipe = write_recipe(tmp_path, small_base, evaluation={"lm_eval": {"tasks": ["piqa"]}})
    ignored = checked(epi_ds("eval", str(small_base), "--recipe", str(recipe), "--limit", "3"), exit_code=2)
    assert "--limit: of a recipe, evaluation.lm_eval says it" in ignored
    refused = checked(epi_ds("train", str(recipe), num_ranks=RANKS), exit_code=1)
    assert refused.count("the rows of task piqa would have to be fetched") == 1
    assert "Traceback" not in refused
