"""Ranks that mpirun starts: the run that the deepspeed launcher would have made."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.recipes import RANKS, TOTAL_STEPS, lines_of
from tests.end_to_end.test_preemption import LOOP, started
from tests.support.processes import checked, run_command, run_epi_ds

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(
        shutil.which("mpirun") is None, reason="no mpirun (Debian, Ubuntu: apt-get install openmpi-bin)"
    ),
]


def steps_in(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
def test_ranks_of_mpirun_save_when_they_are_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun itself ends ranks upon SIGTERM without letting them save."""
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    command = ("launch", "mpi", LOOP, str(tmp_path), "--ranks", str(RANKS), "--option=--oversubscribe")
    log = tmp_path / "rank_1.jsonl"
    with started(*command, when=lambda: steps_in(log) >= 3) as run:
        run.command.send_signal(signal.SIGTERM)
        output = run.ended()
    assert "(SIGUSR1): " in output
    assert 3 <= steps_in(log) < 40
    checked(run_epi_ds(*command))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 41))


@pytest.mark.slow
def test_processes_of_mpirun_are_ranks(
    recipe_of: Callable[[Path], Path], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    command = [str(Path(sys.prefix) / "bin" / "epi-ds"), "train", str(recipe_of(tmp_path)), f"ranks={RANKS + 1}"]
    output = checked(run_command(["mpirun", "-np", str(RANKS), "--oversubscribe", *command]))
    assert f"ranks: {RANKS + 1} is ignored, because {RANKS} were started" in output
    steps = lines_of(tmp_path / "run", "step")
    assert len(steps) == TOTAL_STEPS
    assert steps == lines_of(undisturbed, "step")
