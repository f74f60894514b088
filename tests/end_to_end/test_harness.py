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


@pytest.mark.slow
def test_an_export_scores_what_its_run_scored_last(small_base: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    recipe = write_recipe(
        tmp_path,
        small_base,
        stages=[{"name": "a", "data": {"skill": "arithmetic", "rows": 24}, "learning_rate": 1e-2}],
        evaluation={
            "skills": [],
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
    assert list(last) == ["a", *NAMES]
    assert all(name in (run / "report.html").read_text() for name in NAMES)
    options = ("--tasks", ",".join(ALL), "--include-path", str(tasks), "--limit", "5", "--batch-size", "8")
    output = checked(epi_ds("eval", str(run / "export"), *options, "--against", str(small_base), "--json"))
    found = json.loads(output.splitlines()[-1])
    for name in NAMES:
        assert found["tasks"][name] == last[name]
        assert found["against"]["tasks"][name] == before[name]
        assert found["difference"][name] == last[name]["value"] - before[name]["value"]
    assert any(found["difference"].values())


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
    recipe = write_recipe(tmp_path, small_base, evaluation={"lm_eval": {"tasks": ["piqa"]}})
    refused = checked(epi_ds("train", str(recipe), num_ranks=RANKS), exit_code=1)
    assert refused.count("the rows of task piqa would have to be fetched") == 1
    assert "Traceback" not in refused
