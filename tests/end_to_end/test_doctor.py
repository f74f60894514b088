"""``epi-ds doctor`` as users start it: alone, as ranks, and where something is wrong."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from epi_ds.launch.local import free_port
from tests.support.processes import Finished, checked, run_command, run_epi_ds

pytestmark = pytest.mark.end_to_end

EPI_DS = str(Path(sys.prefix) / "bin" / "epi-ds")
TIMEOUT = 10
# Joins the other ranks, and dies.
DIES = """
import os
from epi_ds.doctor.team import assemble, meet
from epi_ds.launch.rank_environment import discover
place = discover(os.environ)
assemble(place, meet(place, seconds=60), seconds=60)
os._exit(3)
"""


@pytest.fixture(autouse=True)
def _buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends at once loses what it has not flushed."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def rank(rank: int, port: int, command: list[str], *, cwd: Path | None = None, **variables: str) -> Finished:
    """Run a command as one of two ranks, each of which passes for a node."""
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": f"n{rank}",
        **variables,
    }
    return run_command(["env", *(f"{name}={value}" for name, value in own.items()), *command], cwd=cwd, timeout=180)


def reports_in(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"level"')]


def findings_of(report: Mapping[str, Any], subject: str) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["subject"] == subject]


@pytest.mark.slow
def test_this_machine_trains(tmp_path: Path) -> None:
    [report] = reports_in(checked(run_epi_ds("doctor", str(tmp_path), "--json")))
    assert report["level"] in ("ok", "warn")
    [ranks] = findings_of(report, "ranks")
    assert ranks["level"] == "ok"
    assert "2 ranks reach each other" in ranks["said"]
    assert "nothing between nodes was tried" in ranks["said"]
    assert any("read what rank 0 has renamed" in finding["said"] for finding in findings_of(report, "folder"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_red_lines_hide_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a killed build's lock, which every start waits for, and of a DeepSpeed that cannot be imported."""
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    broken = tmp_path / "broken" / "deepspeed"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise ImportError("libcudart.so.12: cannot open shared object file")')
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parent.parent))
    monkeypatch.setenv("PYTHONPATH", str(broken.parent), prepend=":")
    output = checked(run_epi_ds("doctor", str(tmp_path)), exit_code=1)
    lines = output.splitlines()
    assert "Traceback" not in output
    assert [line.split()[:2] for line in lines if line.startswith("FAIL")] == [
        ["FAIL", "operators"],
        ["FAIL", "locks"],
        ["FAIL", "ranks"],
    ]
    assert f"{lock}: left by a build that was killed" in output
    assert "2 ranks did not start: ImportError: libcudart.so.12" in output
    assert all(line.startswith(("ok  ", "warn", "FAIL")) for line in lines)
    assert any(line.startswith("ok   memory") for line in lines)
    assert not lock.with_name("build.ninja").exists()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun (Debian, Ubuntu: apt-get install openmpi-bin)")
def test_processes_of_mpirun_print_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    command = ["mpirun", "-np", "2", "--oversubscribe", EPI_DS, "doctor", str(tmp_path), "--json"]
    [report] = reports_in(checked(run_command(command)))
    [ranks] = findings_of(report, "ranks")
    assert "2 ranks reach each other" in ranks["said"]
    assert [finding["level"] for finding in findings_of(report, "software")] == ["ok"]


@pytest.mark.slow
def test_nodes_that_differ_are_named(tmp_path: Path) -> None:
    """The second one has no compiler, a lock that was left behind, and another folder under the same name."""
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    folders = [tmp_path / name for name in ("first", "second", "empty")]
    for folder in folders:
        folder.mkdir()
    port = free_port()
    other = {"TORCH_EXTENSIONS_DIR": str(lock.parent.parent), "PATH": str(folders[2])}
    command = [EPI_DS, "doctor", "--json"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(rank, 0, port, command, cwd=folders[0])
        second = pool.submit(rank, 1, port, command, cwd=folders[1], **other)
        output = checked(first.result(), exit_code=1)
        assert reports_in(checked(second.result())) == []
    [report] = reports_in(output)
    red = [(finding["subject"], finding["nodes"]) for finding in report["findings"] if finding["level"] == "FAIL"]
    assert red == [("compiler", ["n1"]), ("locks", ["n1"]), ("folder", ["n1"])]
    [ranks] = findings_of(report, "ranks")
    assert ranks["said"] == "gloo: 2 ranks reach each other, on 2 nodes (n0, n1)"
    assert [finding["nodes"] for finding in findings_of(report, "software")] == [[]]
    assert any(
        "plain torch" in finding["said"] and finding["nodes"] == ["n1"] for finding in findings_of(report, "kernels")
    )
    assert [finding["level"] for finding in findings_of(report, "clock")] == ["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True])
def test_a_rank_that_does_not_reach_the_first_one_says_so(listens: bool) -> None:
    """Nobody listens there, or a program that never answers, for which torch would wait forever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if listens else free_port()
        started = time.monotonic()
        found = rank(1, port, [EPI_DS, "doctor", "--timeout", str(TIMEOUT)])
    [line] = checked(found, exit_code=1).splitlines()
    assert line.startswith("FAIL ranks        n1: ")
    assert f"127.0.0.1:{port}" in line
    assert "GLOO_SOCKET_IFNAME" in line
    # Importing torch comes on top.
    assert time.monotonic() - started < TIMEOUT + 60


@pytest.mark.slow
def test_ranks_that_do_not_come_are_counted() -> None:
    output = checked(rank(0, free_port(), [EPI_DS, "doctor", "--json", "--timeout", "3"]), exit_code=1)
    [report] = reports_in(output)
    [ranks] = findings_of(report, "ranks")
    assert ranks["level"] == "FAIL"
    assert ranks["said"] == "1 of 2 ranks came within 3 s, on n0; missing: rank 1"
    assert [finding["level"] for finding in findings_of(report, "software")] == ["ok"]


@pytest.mark.slow
def test_a_rank_that_dies_hides_nothing_of_the_others() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(rank, 0, port, [EPI_DS, "doctor", "--json", "--timeout", str(TIMEOUT)])
        checked(pool.submit(rank, 1, port, [sys.executable, "-c", DIES]).result(), exit_code=3)
        [report] = reports_in(checked(first.result(), exit_code=1))
    [ranks] = findings_of(report, "ranks")
    assert ranks["level"] == "FAIL"
    assert "another rank has ended" in ranks["said"]
    assert findings_of(report, "memory")
