"""A rank that dies, stops, or loses its launcher ends the whole run, within the time that the recipe gives it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from epi_ds.train.metrics import read_metrics
from tests.end_to_end.conftest import Demo
from tests.end_to_end.recipes import RANKS, write_recipe
from tests.support.forks import epi_ds
from tests.support.processes import checked

pytestmark = pytest.mark.end_to_end

TIMEOUT = 10
# DeepSpeed's launcher leaves its ranks so long between SIGTERM, which a stopped process does not hear, and SIGKILL.
GRACE = 30


class Run(NamedTuple):
    """An ``epi-ds train`` with at least one checkpoint, its launcher and its ranks."""

    command: subprocess.Popen[str]
    launcher: psutil.Process
    ranks: list[psutil.Process]
    folder: Path


@contextmanager
def training(base: Path, folder: Path, **arguments: str) -> Iterator[Run]:
    train = {"ddp_timeout": TIMEOUT, "save_steps": 1, **arguments}
    recipe = write_recipe(folder, base, train=train, evaluation={"rows": 2})
    command = subprocess.Popen(
        [str(Path(sys.prefix) / "bin" / "epi-ds"), "train", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not (folder / "run" / "checkpoints" / "checkpoint-2" / "epi" / "manifest.json").exists():
            assert command.poll() is None, command.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found = psutil.Process(command.pid).children(recursive=True)
        ranks = sorted((p for p in found if "RANK" in p.environ()), key=lambda p: p.environ()["RANK"])
        assert len(ranks) == RANKS
        (launcher,) = psutil.Process(command.pid).children()
        yield Run(command, launcher, ranks, folder / "run")
    finally:
        for process in found:
            if process.is_running():
                process.kill()
        command.kill()


@pytest.mark.parametrize(
    ("number", "seconds", "said"),
    [
        (signal.SIGKILL, 20, "another rank has ended|a rank or the launcher was ended by SIGKILL"),
        pytest.param(signal.SIGSTOP, TIMEOUT + GRACE + 20, "another rank was stopped or hangs", marks=pytest.mark.slow),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_ends_the_run(
    number: signal.Signals, seconds: float, said: str, demo: Demo, tmp_path: Path
) -> None:
    with training(demo.folder / "base", tmp_path) as run:
        run.ranks[1].send_signal(number)
        output, _ = run.command.communicate(timeout=seconds)
        assert run.command.returncode == 1
        messages = [line for line in output.splitlines() if line.startswith("error: ")]
        assert messages, output
        for message in messages:
            assert re.search(said, message), output
            assert f"the newest checkpoint is {run.folder}/checkpoints/checkpoint-" in message
        assert "Traceback" not in output
        _, alive = psutil.wait_procs(run.ranks, timeout=5)
        assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("file", ["metrics.jsonl", "tensorboard/events.*"])
def test_a_full_disk_ends_the_run_with_one_message(file: str, small_base: Path, tmp_path: Path) -> None:
    """Files of rank 0 may not grow beyond the size that one of them has, which is therefore what fails first."""
    tracker = "none" if file == "metrics.jsonl" else "tensorboard"
    with training(small_base, tmp_path, report_to=tracker) as run:
        (path,) = run.folder.glob(file)
        run.ranks[0].rlimit(psutil.RLIMIT_FSIZE, (path.stat().st_size,) * 2)
        output, _ = run.command.communicate(timeout=60)
        assert run.command.returncode == 1
        assert "Traceback" not in output, output
        # The other one says whom it lost.
        (message,) = [line for line in output.splitlines() if line.startswith("error: rank 0: ")]
        # What a library writes has no name in its error.
        named = path if tracker == "none" else f"a file in {run.folder}"
        assert re.search(
            rf"{named} could not be written: File too large; its file system has [\d.]+ GB free\. Make room", message
        )
        assert f"go on: the newest checkpoint is {run.folder}/checkpoints/checkpoint-" in message
        _, alive = psutil.wait_procs(run.ranks, timeout=5)
        assert not alive
    if tracker == "none":
        assert "resuming " in checked(epi_ds("train", str(tmp_path / "recipe.yaml"), num_ranks=RANKS))
        assert [line["event"] for line in read_metrics(path)][-1] == "end"


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(demo: Demo, tmp_path: Path) -> None:
    """Also those that are stopped: a launcher that is killed tells nobody."""
    with training(demo.folder / "base", tmp_path) as run:
        run.ranks[1].send_signal(signal.SIGSTOP)
        run.launcher.kill()
        output, _ = run.command.communicate(timeout=20)
        assert run.command.returncode != 0, output
        _, alive = psutil.wait_procs(run.ranks, timeout=5)
        assert not alive
