"""``EPICallback`` in a script that knows TRL and nothing else of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Demo
from tests.support.processes import checked, launch

pytestmark = pytest.mark.end_to_end

SCRIPT = "tests.end_to_end.plain_sft"


def test_a_plain_script_isolates_and_resumes_to_the_bit(demo: Demo, tmp_path: Path) -> None:
    model, whole, resumed = str(demo.folder / "base"), tmp_path / "whole", tmp_path / "resumed"
    resumed.mkdir()
    checked(launch(SCRIPT, model, str(whole), num_ranks=2))
    checked(launch(SCRIPT, model, str(resumed), str(whole / "checkpoint-4"), num_ranks=2))
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (whole, resumed))
    assert first["world_size"] == 2
    assert first["isolated"] > 0
    # The resumed log begins with what the checkpoint had logged.
    assert first == second
    assert len(first["losses"]) == first["applied_steps"] == 8


def test_ranks_that_would_train_on_the_same_rows_are_refused(demo: Demo, tmp_path: Path) -> None:
    """What a plain script does on the CPU when accelerate is not told of the ranks."""
    finished = launch(SCRIPT, str(demo.folder / "base"), str(tmp_path / "run"), "--unprepared", num_ranks=2)
    assert finished.exit_code != 0
    assert "every rank would train on the same rows" in finished.output
    assert "prepare_accelerate()" in finished.output
