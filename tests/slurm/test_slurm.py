"""Jobs on a real Slurm of two nodes: whatever ends them, they go on, and end as if nobody had disturbed them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.recipes import ACCUMULATION, TOTAL_STEPS, assert_same_files, lines_of, write_recipe
from tests.slurm.cluster import PATIENCE, Cluster, running_cluster
from tests.support.processes import checked, run_epi_ds
from tests.support.tags import manifest_of

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.slurm,
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in ("slurmctld", "slurmd", "munged")),
        reason="no Slurm (Debian, Ubuntu: docker/install_system.sh slurm)",
    ),
]

RECORDER = str(Path(__file__).resolve().parents[1] / "end_to_end" / "recorder.py")
SAVE_STEPS = 3
# In the second stage of three, not where a checkpoint is due.
DISTURBED_AT = 7


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes, which commands of this process find."""
    with pytest.MonkeyPatch.context() as environment, running_cluster() as started:
        for name, value in started.environment.items():
            environment.setenv(name, value)
        yield started


class Job:
    """A recorded run of the recipe as a job of two nodes."""

    def __init__(self, cluster: Cluster, folder: Path, base: Path) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        self.recipe = write_recipe(
            folder,
            base,
            evaluation={"rows": 4, "max_new_tokens": 4},
            train={"save_steps": SAVE_STEPS},
            # The time limits here are short. The same for all: it is in DeepSpeed's files, which are compared.
            method={"epi": {**_epi_of(folder, base), "checkpoint": {"stop_before_end": 25}}},
        )
        self.id = ""

    def submit(self, *options: str) -> None:
        """Submit it by ``epi-ds launch slurm``."""
        # A script of the user's, as far as the launcher knows, that trains the recipe and records rows.
        script = [RECORDER, "--", str(self.recipe), str(self.folder)]
        self.id = submitted("--nodes", "2", "--name", self.folder.name, *options, *script)[0]

    @property
    def steps(self) -> list[int]:
        """The steps that the metrics have by now."""
        return [line["step"] for line in self._lines() if line["event"] == "step"]

    def _lines(self) -> list[dict[str, Any]]:
        """The metrics by now: they may be written to at this moment."""
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is done."""
        deadline = time.monotonic() + PATIENCE
        while step not in self.steps:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def wait_for_start(self, number: int) -> None:
        """Wait until so many processes have begun."""
        deadline = time.monotonic() + PATIENCE
        while len(self.starts) < number:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    @property
    def log(self) -> str:
        """What the job has printed."""
        return "".join(path.read_text() for path in Path("runs/recorder/slurm").glob(f"{self.folder.name}-*.log"))

    @property
    def starts(self) -> list[int]:
        """The steps at which its processes began."""
        return [line["step"] for line in self._lines() if line["event"] == "run"]

    def rows(self, rank: int) -> list[list[Any]]:
        """The rows of each micro-batch, by step; those of a step that was repeated, of its last time."""
        by_step: dict[int, list[Any]] = {step: [] for step in range(TOTAL_STEPS)}
        for line in (self.folder / f"rank_{rank}.jsonl").read_text().splitlines():
            found = json.loads(line)
            by_step[found["step"]].append(found["rows"])
        # A process may go on at the very step in which the one before it was killed.
        return [rows[-ACCUMULATION:] for rows in by_step.values()]


def _epi_of(folder: Path, base: Path) -> dict[str, Any]:
    """The isolation settings of the recipe as it is written otherwise."""
    section: dict[str, Any] = yaml.safe_load(write_recipe(folder, base).read_text())["method"]["epi"]
    return section


def submitted(*arguments: str) -> list[str]:
    """Call ``epi-ds launch slurm --submit``; return the ids of the jobs."""
    output = checked(run_epi_ds("launch", "slurm", "--submit", *arguments))
    return re.findall(r"submitted job (\d+)", output)


@pytest.fixture
def job(cluster: Cluster, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job that is not submitted yet."""
    monkeypatch.chdir(tmp_path)
    return Job(cluster, tmp_path / "job", small_base)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as place:
        place.chdir(folder)
        found = Job(cluster, folder / "job", small_base)
        found.submit()
        cluster.finish(found.id)
    assert found.starts == [0]
    return found


def assert_undisturbed(one: Job, undisturbed: Job) -> None:
    """Compare losses, refreshes, scores, the order of rows, and every file of the last checkpoint."""
    for event in ("step", "refresh", "evaluation"):
        assert lines_of(one.run, event) == lines_of(undisturbed.run, event)
    assert one.steps == list(range(1, TOTAL_STEPS + 1))
    for rank in range(2):
        assert one.rows(rank) == undisturbed.rows(rank)
    name = f"checkpoints/checkpoint-{TOTAL_STEPS}"
    assert_same_files(manifest_of(one.run / name), manifest_of(undisturbed.run / name))


def requeue(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.id)


def signal_tasks(job: Job) -> None:
    job.cluster.run("scancel", "--signal=USR1", job.id)


def preempt(job: Job) -> None:
    """Let a job of the partition with the higher priority take both nodes."""
    job.cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


@pytest.mark.slow
def test_a_job_that_is_told_to_end_loses_nothing(job: Job, undisturbed: Job) -> None:
    """In all ways in which Slurm tells, one after the other, each while it trains on from the last."""
    job.submit()
    stops: list[int] = []
    for disturb, told in ((requeue, "SIGTERM"), (signal_tasks, "SIGUSR1"), (preempt, "SIGTERM")):
        # Not where a checkpoint is due: a multiple of SAVE_STEPS would be saved anyway.
        asked = (stops[-1] if stops else 1) + 1
        job.wait_for_step(asked)
        disturb(job)
        job.wait_for_start(len(stops) + 2)
        stops.append(job.starts[-1])
        # Saved at the step at which the ranks agreed, and not at the checkpoint before it.
        assert stops[-1] >= asked
        assert f"stopped after step {stops[-1]} ({told})" in job.log
    job.cluster.finish(job.id)
    assert_undisturbed(job, undisturbed)
    assert job.cluster.restarts(job.id) == len(stops)
    assert job.starts == [0, *stops]


@pytest.mark.slow
@pytest.mark.parametrize("by_signal", [True, False], ids=["signal", "clock"])
def test_a_job_saves_before_its_time_is_up(
    by_signal: bool, job: Job, undisturbed: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by Slurm, as ``--signal`` asks; or, where nobody asked, by what Slurm says of the time limit."""
    # The first process is still training when it is told. Slurm looks at its limits every 30 seconds, and sends the
    # signal at the last look that is early enough: here 40 to 70 seconds after the start. A minute is the least that it
    # can limit.
    monkeypatch.setenv("RECORDER_SECONDS", "3.5" if by_signal else "1.25")
    limits = ["--time", "2", "--grace", "50"] if by_signal else ["--time", "1", "--option=--signal=CONT@1"]
    # On a busy machine the signal may come before training begins.
    job.submit("--retries", "9", *limits)
    job.cluster.finish(job.id)
    assert_undisturbed(job, undisturbed)
    assert len(job.starts) > 1
    stops = re.findall(r"stopped after step (\d+) \((.*?)\)", job.log)
    assert sorted({int(step) for step, _ in stops} - {0}) == job.starts[1:]
    assert ("SIGUSR1" if by_signal else "the job's time limit") in {cause for _, cause in stops}


@pytest.mark.slow
def test_a_job_that_loses_a_rank_or_a_node_goes_on_from_its_last_checkpoint(job: Job, undisturbed: Job) -> None:
    # Two losses, and Slurm may end what runs once more as it hears of the node that comes back.
    job.submit("--retries", "9")
    job.wait_for_step(SAVE_STEPS + 1)
    # Rank 0 is on the node of the batch script, which goes with it.
    ranks = job.cluster.ranks_of(job.id)
    assert sorted(ranks) == ["n1", "n2"]
    ranks["n2"].kill()
    job.wait_for_start(2)
    job.wait_for_step(DISTURBED_AT)
    job.cluster.lose("n2")
    job.cluster.wait_for("lost", job.id, "PENDING", "COMPLETING")
    job.cluster.start("n2")
    job.cluster.finish(job.id)
    assert_undisturbed(job, undisturbed)
    # What was trained after the last checkpoint is trained again.
    assert job.starts[0] == 0
    assert len(job.starts) > 2
    assert all(start % SAVE_STEPS == 0 and start >= SAVE_STEPS for start in job.starts[1:])
    assert job.starts[-1] >= DISTURBED_AT - SAVE_STEPS


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(job: Job) -> None:
    job.submit()
    job.wait_for_step(DISTURBED_AT)
    job.cluster.run("scancel", job.id)
    job.cluster.wait_for("cancelled", job.id, "CANCELLED")
    # A requeue would come from its last lines.
    job.cluster.wait_for_processes(job.id)
    assert job.cluster.state(job.id) == "CANCELLED"
    assert f"stopped after step {job.steps[-1]} (SIGTERM)" in job.log
    assert (job.run / f"checkpoints/checkpoint-{job.steps[-1]}/epi/manifest.json").exists()


@pytest.mark.slow
def test_an_array_trains_a_seed_in_each_task(cluster: Cluster, job: Job, undisturbed: Job) -> None:
    seeds = (3, 4)
    (array,) = submitted(
        str(job.recipe), "--nodes", "2", "--sweep", f"train.seed={','.join(map(str, seeds))}", "--parallel", "1"
    )
    for task in range(len(seeds)):
        cluster.finish(f"{array}_{task}")
    losses = [lines_of(job.run / f"seed-{seed}", "step") for seed in seeds]
    # Seed 3 is the recipe's own.
    assert losses[0] == lines_of(undisturbed.run, "step")
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_stages_are_jobs_that_wait_for_each_other(cluster: Cluster, job: Job, undisturbed: Job) -> None:
    numbers = submitted(str(job.recipe), "--nodes", "2", "--by-stage")
    assert [cluster.state(number) for number in numbers[1:]] == ["PENDING", "PENDING"]
    for number in numbers:
        cluster.finish(number)
    for event in ("step", "evaluation"):
        assert lines_of(job.run, event) == lines_of(undisturbed.run, event)
    assert [line["step"] for line in lines_of(job.run, "run")] == [0, 5, 10]


@pytest.mark.slow
def test_cells_of_a_study_are_tasks_of_an_array(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # At the same time, so that the one makes the base that the other one waits for.
    arms = ("full_lr_1", "anchor_update_2")
    asked = ["--arms", ",".join(arms), "--work", "work", "--results", "smoke.jsonl"]
    output = checked(run_epi_ds("study", "slurm", "smoke", "--submit", *asked))
    assert "smoke: 2 cells, 0 of them finished" in output
    (array,) = re.findall(r"submitted job (\d+)", output)
    for task in range(len(arms)):
        cluster.finish(f"{array}_{task}")
    lines = [json.loads(line) for line in Path("smoke.jsonl").read_text().splitlines()]
    assert {line["arm"]: line["status"] for line in lines} == dict.fromkeys(arms, "ok")
    logs = [path.read_text() for path in Path("work/slurm").glob("*.log")]
    assert sum("started: base" in log for log in logs) == 1
    assert "2 of them finished" in checked(run_epi_ds("study", "slurm", "smoke", *asked))
