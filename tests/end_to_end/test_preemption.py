"""A run that is told to end saves and ends with code 85; the same command goes on to the bit. In all ways of use."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.end_to_end.recipes import RANKS, TOTAL_STEPS, assert_same_files, lines_of
from tests.support.forks import epi_ds, run_module
from tests.support.processes import checked, run_epi_ds
from tests.support.tags import manifest_of

pytestmark = pytest.mark.end_to_end

HERE = Path(__file__).parent
LOOP, SCRIPT = str(HERE / "plain_loop.py"), str(HERE / "plain_sft.py")
REQUEUE = 85
TIMEOUT = 200


class Run(NamedTuple):
    """An ``epi-ds`` command that is training, and its ranks."""

    command: subprocess.Popen[str]
    ranks: list[psutil.Process]

    def ended(self) -> str:
        """Wait for the end that asks for another go; return the output."""
        output, _ = self.command.communicate(timeout=TIMEOUT)
        assert self.command.returncode == REQUEUE, output
        _, alive = psutil.wait_procs(self.ranks, timeout=5)
        assert not alive
        return output


def rank_of(process: psutil.Process) -> str | None:
    """The rank that DeepSpeed's launcher or mpirun gave a process."""
    variables = process.environ()
    return variables.get("RANK", variables.get("OMPI_COMM_WORLD_RANK"))


@contextmanager
def started(*arguments: str, when: Callable[[], bool]) -> Iterator[Run]:
    """Start ``epi-ds`` and yield it when it has got so far."""
    command = subprocess.Popen(
        [str(Path(sys.prefix) / "bin" / "epi-ds"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ranks: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + TIMEOUT
        while not when():
            assert command.poll() is None, command.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = [(rank_of(one), one) for one in psutil.Process(command.pid).children(recursive=True)]
        ranks = [one for rank, one in sorted(children, key=lambda pair: pair[0] or "") if rank is not None]
        assert len(ranks) == RANKS
        yield Run(command, ranks)
    finally:
        for process in ranks:
            if process.is_running():
                process.kill()
        command.kill()


def steps_in(file: Path) -> list[int]:
    """The steps in a log that may be written to at this moment."""
    if not file.exists():
        return []
    return [json.loads(line)["step"] for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
def test_a_loop_stops_at_one_step_whatever_each_rank_hears(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ("launch", "local", LOOP, str(stopped), "--ranks", str(RANKS))
    checked(run_epi_ds("launch", "local", LOOP, str(whole), "--ranks", str(RANKS)))

    log = stopped / "rank_1.jsonl"
    with started(*command, when=lambda: 3 in steps_in(log)) as run:
        # One rank only, and some steps later the other one, twice, as Slurm does it.
        run.ranks[1].send_signal(signal.SIGUSR1)
        run.ranks[0].send_signal(signal.SIGTERM)
        run.ranks[0].send_signal(signal.SIGTERM)
        run.ranks[0].send_signal(signal.SIGCONT)
        output = run.ended()
    stop = steps_in(log)[-1]
    assert 3 <= stop < 40
    assert f"stopped after step {stop} (SIG" in output
    assert f"{stopped}/global_step{stop} has everything" in output

    # And once more, to the command itself, of which the ranks know nothing.
    with started(*command, when=lambda: stop + 3 in steps_in(log)) as run:
        run.command.send_signal(signal.SIGUSR1)
        run.ended()
    checked(run_epi_ds(*command))
    assert (stopped / "result.json").read_text() == (whole / "result.json").read_text()
    for rank in range(RANKS):
        name = f"rank_{rank}.jsonl"
        # No step twice, and none left out.
        assert (stopped / name).read_text() == (whole / name).read_text()


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    command = ("launch", "local", LOOP, str(tmp_path), "--ranks", str(RANKS))
    log = tmp_path / "rank_0.jsonl"
    with started(*command, when=lambda: 2 in steps_in(log)) as run:
        # So that the first one alone cannot end it.
        run.ranks[1].suspend()
        run.command.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            run.command.communicate(timeout=1.0)
        run.command.send_signal(signal.SIGINT)
        output, _ = run.command.communicate(timeout=TIMEOUT)
        assert run.command.returncode not in (0, REQUEUE)
        assert "saving a checkpoint and stopping; Ctrl-C again stops at once" in output
        _, alive = psutil.wait_procs(run.ranks, timeout=5)
        assert not alive
    assert not list(tmp_path.glob("global_step*"))


def assert_same_run(one: Path, other: Path) -> None:
    """Compare losses, refreshes and scores by step, and every file of the last checkpoint: weights, masks, moments."""
    for event in ("step", "refresh", "evaluation"):
        assert lines_of(one, event) == lines_of(other, event)
    assert len(lines_of(one, "step")) == TOTAL_STEPS
    name = f"checkpoints/checkpoint-{TOTAL_STEPS}"
    assert_same_files(manifest_of(one / name), manifest_of(other / name))


@pytest.mark.slow
def test_a_recipe_goes_on_where_it_was_told_to_stop(
    recipe_of: Callable[[Path], Path], undisturbed: Path, tmp_path: Path
) -> None:
    recipe, run_folder = recipe_of(tmp_path), tmp_path / "run"
    metrics = run_folder / "metrics.jsonl"
    with started("train", str(recipe), when=lambda: 7 in steps_in(metrics)) as run:
        run.command.send_signal(signal.SIGTERM)
        output = run.ended()
    assert "(SIGTERM): " in output
    assert "Traceback" not in output
    checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    assert_same_run(run_folder, undisturbed)
    starts = [line["step"] for line in lines_of(run_folder, "run")]
    assert starts[0] == 0
    assert 7 <= starts[1] < TOTAL_STEPS
    # Both processes are one run of the tracker.
    assert len(list((run_folder / "tensorboard").glob("events.*"))) == 2


@pytest.mark.slow
def test_stages_are_trained_by_one_process_each(
    recipe_of: Callable[[Path], Path], undisturbed: Path, tmp_path: Path
) -> None:
    recipe, run_folder = str(recipe_of(tmp_path)), tmp_path / "run"
    checked(epi_ds("train", recipe, "--until", "reset", num_ranks=RANKS))
    assert [line["step"] for line in lines_of(run_folder, "evaluation")] == [0, 5]
    assert not (run_folder / "export").exists()
    assert "stage reset has ended already" in checked(epi_ds("train", recipe, "--until", "reset", num_ranks=RANKS))
    for _ in range(2):
        # A second time too, as after a stop while the model was exported.
        shutil.rmtree(run_folder / "export", ignore_errors=True)
        checked(epi_ds("train", recipe, "--until", "chat", num_ranks=RANKS))
        assert (run_folder / "export" / "config.json").exists()
    assert_same_run(run_folder, undisturbed)
    # Of the two that came to the end.
    assert len(lines_of(run_folder, "summary")) == 2
    assert "no such stage; did you mean 'chat'" in checked(epi_ds("train", recipe, "--until", "chats"), 2)


@pytest.mark.slow
def test_a_stop_at_the_end_of_a_stage_leaves_its_evaluation_to_the_next_process(
    recipe_of: Callable[[Path], Path], undisturbed: Path, tmp_path: Path
) -> None:
    """Scoring may take longer than the job has left; the scores are the same afterwards."""
    recipe = recipe_of(tmp_path)
    stopped = run_module("tests.end_to_end.stop_at", str(recipe), "5", num_ranks=RANKS)
    assert stopped.exit_code == REQUEUE, stopped.output
    assert [line["step"] for line in lines_of(tmp_path / "run", "evaluation")] == [0]
    checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_trainer_s_script_stops_and_goes_on_by_itself(small_base: Path, plain_script: Path, tmp_path: Path) -> None:
    command = ("launch", "local", SCRIPT, "--ranks", str(RANKS), "--", str(small_base), str(tmp_path))
    first = run_epi_ds(*command, "--newest", "3")
    assert first.exit_code == REQUEUE, first.output
    assert f"stopped after step 3 (SIGTERM): {tmp_path}/checkpoint-3 has everything" in first.output
    assert not (tmp_path / "result.json").exists()
    checked(run_epi_ds(*command, "--newest"))
    results: list[Any] = [json.loads((folder / "result.json").read_text()) for folder in (plain_script, tmp_path)]
    assert results[0] == results[1]
