"""What the doctor says of one node: each check in the situation that it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import epi_ds.doctor.clock
from epi_ds.doctor.clock import Offset, clock, judged
from epi_ds.doctor.compiler import compiler
from epi_ds.doctor.finding import Check, CheckFailedError, Finding, Level, Subject, from_json, in_order, to_json, worst
from epi_ds.doctor.folder import folder
from epi_ds.doctor.memory import SHARED_BYTES_PER_RANK, shared_memory
from epi_ds.doctor.nodes import Said, merged
from epi_ds.doctor.operators import locks, operators
from epi_ds.doctor.reach import reach
from epi_ds.doctor.report import Report
from epi_ds.doctor.shared_folder import content, look, shared_folder
from epi_ds.doctor.slurm import requeue, slurm
from epi_ds.doctor.software import compared, software
from epi_ds.doctor.team import Team
from tests.support.ranks import run_ranks

# Those of DeepSpeed on the CPU, by the names of their libraries.
OPERATORS = ("deepspeed_shm_comm", "fused_adam", "cpu_adam", "async_io")


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of built operators."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def build(extensions: Path) -> None:
    """Put something in the places of built operators."""
    for name in OPERATORS:
        (extensions / name).mkdir(parents=True)
        (extensions / name / f"{name}.so").touch()


def levels_of(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def test_a_lock_that_nobody_holds_is_red(extensions: Path) -> None:
    assert levels_of(locks()) == [Level.OK]
    lock = extensions / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with lock.open():
        assert levels_of(locks()) == [Level.OK]
    [found] = locks()
    assert found.level is Level.FAIL
    assert str(lock) in found.said
    assert "epi-ds build-operators removes it" in found.remedy


def test_operators_that_are_not_built_are_named(extensions: Path) -> None:
    left, nvme = operators()
    assert left.level is nvme.level is Level.WARN
    assert "ShareMemComm, FusedAdam, CPUAdam not built" in left.said
    assert left.remedy == "epi-ds build-operators"
    assert "no NVMe offload" in nvme.said
    build(extensions)
    assert levels_of(operators()) == [Level.OK, Level.OK]
    assert not (extensions / "cpu_adam" / "build.ninja").exists()


def test_without_a_compiler_what_is_built_decides(
    extensions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert levels_of(compiler()) == [Level.OK]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler()[0].said.startswith("CXX=no-such-compiler does not exist")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    [found] = compiler()
    assert found.level is Level.FAIL
    assert "DeepSpeed needs ShareMemComm, FusedAdam, CPUAdam" in found.said
    assert "apt-get install g++" in found.remedy
    build(extensions)
    assert levels_of(compiler()) == [Level.WARN]


def test_versions_are_compared_with_what_the_distribution_declares() -> None:
    assert levels_of(software()) == [Level.OK]
    found = compared(
        ["torch<2", "no-such-distribution>=1.5", "pytest>=1000; extra == 'dev'", "safetensors>=0.6"], python=">=3.99"
    )
    assert [finding.said.partition(",")[0] for finding in found] == [
        f"python {'.'.join(map(str, sys.version_info[:3]))}",
        f"torch {torch.__version__}",
        "no-such-distribution is not installed",
        f"python {'.'.join(map(str, sys.version_info[:3]))}",
    ]
    assert levels_of(found) == [Level.FAIL, Level.FAIL, Level.FAIL, Level.OK]
    assert found[1].remedy == "pip install 'torch<2'"
    assert "safetensors" in found[3].said
    assert "torch" not in found[3].said


def test_shared_memory_must_hold_the_buffers_of_all_ranks() -> None:
    # What a container gets by default.
    small = shared_memory(64 << 20, num_ranks=1, on_cpu=True)
    assert small.level is Level.FAIL
    assert "--shm-size" in small.remedy
    assert shared_memory(2 * SHARED_BYTES_PER_RANK, num_ranks=2, on_cpu=True).level is Level.OK
    assert shared_memory(2 * SHARED_BYTES_PER_RANK, num_ranks=3, on_cpu=True).level is Level.FAIL
    assert shared_memory(64 << 20, num_ranks=1, on_cpu=False).level is Level.WARN


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    works, room = folder(tmp_path)
    assert works.level is Level.OK
    assert works.said.startswith(str(tmp_path))
    assert "GB free" in room.measured
    assert list(tmp_path.iterdir()) == []
    [missing] = folder(tmp_path / "missing")
    assert missing.level is Level.FAIL
    # Where even root cannot write.
    [refused] = folder(Path("/proc"))
    assert refused.level is Level.FAIL
    assert "/proc: what saving a checkpoint does failed" in refused.said


def test_a_file_is_awaited_until_it_is_whole_and_new(tmp_path: Path) -> None:
    old, new = content("old"), content("new")
    file = tmp_path / "file"
    file.write_bytes(new)
    assert look(file, new, before=old).problem == ""
    file.write_bytes(new[:1000])
    assert "reads 1000 bytes" in look(file, new, before=old).problem
    # A folder that is not there does not come.
    started = time.monotonic()
    assert "does not see it" in look(tmp_path / "missing" / "file", new, before=None).problem
    assert time.monotonic() - started < 5


def test_slurm_says_whether_a_job_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "JobId=3 JobName=train UserId=root(0) Priority=1 Requeue={} Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0"
    assert requeue(shown.format(1)).level is Level.OK
    for_good = requeue(shown.format(0))
    assert for_good.level is Level.WARN
    assert "#SBATCH --requeue" in for_good.remedy
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm() == []
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    [found] = slurm()
    assert found.level is Level.WARN
    assert "inside job 3, and without sbatch, squeue, scontrol" in found.said


def test_clocks_are_yellow_above_two_seconds() -> None:
    assert judged({}) == []
    near = judged({"n2": Offset(-0.4, 0.001), "n3": Offset(0.1, 0.001)})
    assert levels_of(near) == [Level.OK]
    assert near[0].measured == "400.0 ms, give or take 1.0"
    [far] = judged({"n2": Offset(-3.04, 0.001), "n3": Offset(0.1, 0.001)})
    assert far.level is Level.WARN
    assert far.said == "-3.0 s off rank 0's"
    assert far.nodes == ("n2",)


def _found(level: Level, said: str, measured: str = "", subject: Subject = Subject.SOFTWARE) -> Finding:
    return Finding(level, subject, said, measured=measured)


def test_what_nodes_share_is_said_once() -> None:
    one = [_found(Level.OK, "torch 2.8"), _found(Level.OK, "RAM", "3 GB", Subject.MEMORY)]
    other = [_found(Level.OK, "torch 2.8"), _found(Level.OK, "RAM", "4 GB", Subject.MEMORY)]
    assert merged([Said("a", one), Said("b", other)]) == [one[0], one[1]._replace(measured="3 GB on a")]


def test_what_nodes_do_not_share_is_a_warning() -> None:
    found = merged([Said("a", [_found(Level.OK, "torch 2.8")]), Said("b", [_found(Level.OK, "torch 2.9")])])
    assert [(finding.level, finding.nodes) for finding in found] == [(Level.WARN, ("a",)), (Level.WARN, ("b",))]
    assert "nodes differ" in found[0].remedy
    # Where one says itself that it is worse off, the other is only well.
    found = merged([Said("a", [_found(Level.OK, "torch 2.8")]), Said("b", [_found(Level.FAIL, "no torch")])])
    assert [(finding.level, finding.nodes) for finding in found] == [(Level.OK, ("a",)), (Level.FAIL, ("b",))]


def test_findings_come_in_one_order_and_survive_json() -> None:
    findings = [_found(Level.WARN, "x", "y", Subject.MPI), _found(Level.OK, "z")._replace(nodes=("a",), remedy="r")]
    assert [finding.subject for finding in in_order(findings)] == [Subject.SOFTWARE, Subject.MPI]
    assert from_json(to_json(findings)) == findings
    assert json.loads(to_json(findings))["level"] == "warn" == worst(findings)
    assert worst([]) is Level.OK


def test_a_check_that_fails_hides_no_other() -> None:
    told: list[Finding] = []
    report = Report(told.extend)

    def crashes() -> list[Finding]:
        raise OSError("libcudart.so.12: cannot open shared object file\nsecond line")

    def refuses() -> list[Finding]:
        raise CheckFailedError(_found(Level.FAIL, "no"))

    assert not report.run(Check(Subject.OPERATORS, crashes))
    assert not report.run(Check(Subject.SOFTWARE, refuses))
    assert report.run(Check(Subject.MPI, lambda: [_found(Level.OK, "yes", subject=Subject.MPI)]))
    report.tell()
    assert [finding.said for finding in told] == [
        "no",
        "OSError: libcudart.so.12: cannot open shared object file",
        "yes",
    ]
    assert levels_of(told) == [Level.FAIL, Level.FAIL, Level.OK]


def test_a_check_that_hangs_ends_the_process_with_what_was_found() -> None:
    script = """
import time
from epi_ds.doctor.finding import Check, Finding, Level, Subject
from epi_ds.doctor.report import Report

report = Report(lambda findings: [print(finding.level.value, finding.said, flush=True) for finding in findings])
report.run(Check(Subject.SOFTWARE, lambda: [Finding(Level.OK, Subject.SOFTWARE, "before")]))
report.run(Check(Subject.FOLDER, lambda: time.sleep(600)), seconds=1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["ok before", "FAIL no answer within 1 s; what comes after it was not looked at"]


def _as_team(check: str, path: str | None = None) -> list[Finding]:
    """Run a check of ranks as one of them; the ranks pass for two nodes."""
    team = Team(dist.get_rank(), 0, ["a", "b"], timedelta(seconds=20), dist.HashStore())
    if check == "reach":
        return reach(team)
    if check == "shared_folder":
        return shared_folder(team, Path(f"{path}/{team.nodes[team.rank]}"))
    if team.rank == 0:
        return clock(team)
    real = time.time_ns
    time.time_ns = lambda: real() + 5_000_000_000
    try:
        return clock(team)
    finally:
        time.time_ns = real


def test_ranks_that_reach_each_other_are_counted() -> None:
    [[found], others] = run_ranks(_as_team, 2, "reach")
    assert found.level is Level.OK
    assert found.said == "gloo: 2 ranks reach each other, on 2 nodes (a, b)"
    assert others == []


def test_the_offset_of_a_clock_is_measured() -> None:
    assert epi_ds.doctor.clock.time is time
    [[found], others] = run_ranks(_as_team, 2, "clock")
    assert found.level is Level.WARN
    assert (found.said, found.nodes) == ("+5.0 s off rank 0's", ("b",))
    assert others == []


def test_a_folder_that_one_rank_lacks_is_no_shared_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    [[found], others] = run_ranks(_as_team, 2, "shared_folder", str(tmp_path))
    assert found.level is Level.FAIL
    assert found.nodes == ("b",)
    assert "does not see it" in found.said
    (tmp_path / "b").symlink_to(tmp_path / "a")
    [[found], others] = run_ranks(_as_team, 2, "shared_folder", str(tmp_path))
    assert found.level is Level.OK
    assert others == []
    assert list((tmp_path / "a").iterdir()) == []
    # Rank 0 lacks it.
    (tmp_path / "b").unlink()
    (tmp_path / "a").rmdir()
    [[found], others] = run_ranks(_as_team, 2, "shared_folder", str(tmp_path))
    assert "cannot write it" in found.said
    assert found.nodes == ("a",)
