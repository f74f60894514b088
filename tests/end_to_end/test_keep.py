"""A recipe that keeps what the model can: rows are written, measured and scored once, and a resume goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epi_ds.data.store import digest_of
from tests.end_to_end.recipes import RANKS, lines_of, write_recipe
from tests.support.forks import epi_ds
from tests.support.processes import checked

pytestmark = pytest.mark.end_to_end

KEEP: dict[str, Any] = {
    "data": [{"skill": "logic", "rows": 8}],
    "self": {
        "rows": 10,
        "batch_size": 5,
        "seed": 1,
        "top_p": 0.15,
        "max_prompt_tokens": 12,
        "max_new_tokens": 12,
        "attempts": 20,
    },
    "windows": 2,
    "replay": 0.25,
}


@pytest.mark.slow
def test_what_is_kept_is_written_measured_and_scored_once(small_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        small_base,
        method={"keep": KEEP, "epi": {"ratio": 0.1, "refresh_interval": 2}},
        evaluation={"rows": 4, "max_new_tokens": 4, "skills": []},
        stages=[{"name": name, "data": {"skill": "arithmetic", "rows": 16}} for name in ("one", "two")],
    )
    run = tmp_path / "run"
    first = checked(epi_ds("train", str(recipe), "--until", "one", num_ranks=RANKS))
    assert "own rows 10/10" in first
    assert "importance was measured on 2 global batches" in first
    rows = (run / "own_rows.jsonl").read_text()
    assert len(rows.splitlines()) == 10
    (told,) = lines_of(run, "own_rows")
    assert (told["step"], told["stage"], told["written"], told["asked"]) == (0, "start", 10, 10)
    assert told["sha256"] == digest_of(run / "own_rows.jsonl")
    assert (told["file"], told["is_edited"]) == (str(run / "own_rows.jsonl"), False)
    assert told["left_out"].keys() == {"empty", "cut", "repeated"}
    assert told["num_tokens"] > 0
    (measured, *later) = lines_of(run, "refresh")
    assert (measured["step"], measured["stage"], measured["isolated"] > 0) == (0, "start", True)
    # The mask is that of what is kept until a stage has ended.
    assert {line["isolated"] for line in lines_of(run, "step")} == {measured["isolated"]}
    assert all(line["layer_isolated"] == measured["layer_isolated"] for line in later if line["step"] < 2)
    for line in lines_of(run, "evaluation"):
        assert list(line["scores"]) == ["base/logic", "base/own_rows", "one", "two"]
    second = checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    assert "importance was measured" not in second
    assert "own rows 10/10" not in second
    assert "forgotten of what is kept:" in second
    assert (run / "own_rows.jsonl").read_text() == rows
    assert lines_of(run, "own_rows") == [told]
    assert "10 of 10" in (run / "report.html").read_text()
    # Two of eight rows are drawn from what is kept, as one table; a stage of 16 rows has two such steps.
    replayed = [set(line["source_losses"]) - {"arithmetic"} for line in lines_of(run, "step")]
    assert len(replayed) == 4
    assert all(replayed)
    assert set().union(*replayed) == {"logic (replayed)", "own_rows (replayed)"}
    assert [line["step"] for line in lines_of(run, "refresh")].count(0) == 1
    assert [line["step"] for line in lines_of(run, "evaluation")] == [0, 2, 4]
