"""What is said of a disk that is full, by whom, and of which file. Files that may not grow stand for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from epi_ds.checkpoint.disk import disk_problem, writing
from epi_ds.data.once import once_per_node
from epi_ds.errors import CheckpointError, DiskError, RemedyError, UserError
from epi_ds.own_rows.file import write_rows
from epi_ds.report.page import write_report
from epi_ds.report.run import read_run
from epi_ds.train.metrics import MetricsWriter, read_metrics
from tests.support.full_disk import full

RUN = {"event": "run", "step": 0, "stage": "a", "total_steps": 1, "world_size": 1, "stages": {"a": [0, 1]}}
CONFIG = {"policy": "evolving", "ratio": 0.1, "refresh_interval": 1}
SAID = r"could not be written: File too large; its file system has \d+\.\d\d GB free\. Make room there, or get access"


def report(path: Path) -> None:
    line = {**RUN, "resumed": False, "covered": 9, "config": CONFIG}
    write_report([read_run("x", [line], place="x")], path, title="x")


WRITERS: dict[str, Callable[[Path], object]] = {
    "report": report,
    "own rows": lambda path: write_rows(path, [{"text": "a"}], settings={}, found={}),
    "metrics": lambda path: MetricsWriter(path, resume_step=0),
    "prepared rows": lambda path: once_per_node(path, lambda: ["folder"], is_worker=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_is_named_and_the_one_before_it_stands(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    if name != "prepared rows":
        path.write_text('{"event": "step", "step": 0}\n')
    before = {one: one.read_bytes() for one in tmp_path.iterdir()}
    with full(), pytest.raises(DiskError, match=f"{path}.*{SAID}") as raised:
        WRITERS[name](path)
    assert isinstance(raised.value.__cause__, OSError)
    assert {one: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()} == before


def test_metrics_of_a_disk_that_becomes_full_are_told_once_and_go_on_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, resume_step=None)
    writer.write("step", step=1, stage="a")
    with full(path.stat().st_size + 5):
        with pytest.raises(DiskError, match=f"{path} {SAID}"):
            writer.write("step", step=2, stage="a")
        # A buffer would try again here, and raise in the place of the error that says it all.
        writer.close()
    writer = MetricsWriter(path, resume_step=1)
    writer.write("step", step=2, stage="a")
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def of_torch(path: Path) -> None:
    torch.save(torch.zeros(9), path)


def of_torch_when_half_is_written(path: Path) -> None:
    # Into its buffer, which is emptied when the file is closed.
    with full(4096):
        torch.save(torch.zeros(1 << 20), path)


def of_a_library(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (of_torch, "a file in {place} could not be written: "),
        (of_torch_when_half_is_written, "a file in {place} could not be written: "),
        (of_a_library, "{place}/file could not be written: No space left on device; "),
    ],
)
def test_what_libraries_write_is_recognised_by_its_error(
    write: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    with full(), pytest.raises((OSError, RuntimeError)) as raised:
        write(tmp_path / "file")
    assert said.format(place=tmp_path) in str(disk_problem(raised.value, place=tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError("a library's own words"),
        KeyError("x"),
        # These say themselves what is to be done.
        UserError("(os error 28)"),
        CheckpointError("(os error 28)"),
    ],
    ids=repr,
)
def test_what_is_not_of_a_disk_is_left_alone(error: Exception, tmp_path: Path) -> None:
    assert disk_problem(error, place=tmp_path) is None


def test_the_rank_that_met_it_is_known_by_the_cause(tmp_path: Path) -> None:
    told = RemedyError("rank 0's words")
    told.__cause__ = DiskError("rank 0's words")
    assert disk_problem(told, place=tmp_path) == "rank 0's words"
    assert disk_problem(RemedyError("rank 0's words"), place=tmp_path) is None


def test_an_error_in_a_block_that_writes_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
