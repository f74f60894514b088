"""Jobs of a study: each once what it needs is there, and nothing made by two commands at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from epi_ds.launch.stop_signals import REQUEUE_EXIT_CODE, ending_when_told
from epi_ds.study.jobs import Ended, Job, run_jobs
from epi_ds.study.maker_locks import take_locks

PATIENCE = 30


class Study:
    """A base that a job makes, and a cell that needs it, as a command runs them."""

    def __init__(self, folder: Path, *, base: str = "touch base; echo made >>made", cell: str = "touch cell") -> None:
        self.folder, self.base = folder, folder / "base"
        self.started: list[str] = []
        self.ended: list[int | None] = []
        # The cell comes first: who has to wait lets others go first.
        self.jobs = [
            self._job("cell", cell, needs=[self.base], ended=lambda ended: self.ended.append(ended.exit_code)),
            self._job("base", base, makes=[self.base], only_makes=True),
        ]

    def _job(self, name: str, script: str, **changes: object) -> Job:
        values = {"ended": _ignored, "needs": (), "makes": (), **changes}
        command = ["sh", "-c", f"cd {self.folder}; {script}"]
        return Job(
            name=name, command=command, environment=lambda: os.environ, log=self.folder / f"{name}.log", **values
        )  # type: ignore[arg-type]

    def run(self) -> None:
        run_jobs(self.jobs, side_by_side=2, started=lambda job: self.started.append(job.name))


def _ignored(ended: Ended) -> None:
    pass


def test_a_cell_runs_once_its_base_is_there(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.run()
    assert (study.started, study.ended) == (["base", "cell"], [0])
    # What is there is not made again.
    again = Study(tmp_path)
    again.run()
    assert (again.started, (tmp_path / "made").read_text()) == (["cell"], "made\n")


def test_a_cell_whose_base_nobody_makes_is_not_started(tmp_path: Path) -> None:
    study = Study(tmp_path, base="exit 3")
    study.run()
    assert (study.started, study.ended) == (["base"], [None])


@pytest.mark.parametrize("other_makes_it", [True, False])
def test_what_another_command_makes_is_waited_for(other_makes_it: bool, tmp_path: Path) -> None:
    study = Study(tmp_path)
    locks = take_locks([study.base])
    assert locks is not None
    assert take_locks([tmp_path / "other", study.base]) is None
    thread = threading.Thread(target=study.run)
    thread.start()
    time.sleep(0.5)
    assert study.started == []
    if other_makes_it:
        study.base.touch()
    locks.close()
    thread.join(PATIENCE)
    # Where the other one failed, it is made here.
    assert study.started == (["cell"] if other_makes_it else ["base", "cell"])
    assert study.ended == [0]
    # What was not all free is free: nothing was locked in part.
    free = take_locks([tmp_path / "other", study.base])
    assert free is not None
    free.close()


def test_a_command_that_is_told_to_end_lets_its_jobs_save(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from epi_ds.launch.stop_signals import ending_when_told
from tests.unit.test_study_jobs import Study
saves = "trap 'echo >saved; exit 0' TERM; touch cell; while true; do sleep 0.1; done"
with ending_when_told():
    Study(Path({str(tmp_path)!r}), cell=saves).run()
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "cell").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == REQUEUE_EXIT_CODE
    assert (tmp_path / "saved").exists()


def test_signals_are_as_before_where_nobody_was_told() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending_when_told():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
