"""A run is followed by its metrics file: what is new, once, through resumes and torn lines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from epi_ds.train.metrics import MetricsWriter
from epi_ds.train.watching import GrowingFile, watch

START: dict[str, Any] = {"resumed": False, "total_steps": 4, "world_size": 2}
STEP: dict[str, Any] = {"loss": 1.5, "isolated_share": 0.25}
SCORES = {"sums": {"value": 0.5}, "chat": {"value": 1.25}}


def test_whole_lines_come_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = GrowingFile(path)
    assert file.read() == []
    path.write_text('{"event": "run", "step": 0}\n{"event": "st')
    assert file.read() == [{"event": "run", "step": 0}]
    assert file.read() == []
    with path.open("a") as more:
        more.write('ep", "step": 1}\n')
    assert file.read() == [{"event": "step", "step": 1}]


def test_a_resumed_run_is_read_from_where_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, resume_step=None)
    writer.write("run", step=0, stage="a", **START)
    for step in (1, 2, 3):
        writer.write("step", step=step, stage="a", **STEP)
    file = GrowingFile(path)
    assert len(file.read()) == 4
    writer.close()
    writer = MetricsWriter(path, resume_step=2)
    # Begun anew, and nothing in it that was not read before.
    assert file.read() == []
    writer.write("run", step=2, stage="a", **{**START, "resumed": True})
    writer.write("step", step=3, stage="a", **STEP)
    assert [(line["event"], line["step"]) for line in file.read()] == [("run", 2), ("step", 3)]
    writer.close()


def shown(path: Path, happens: list[Callable[[], None]]) -> list[str]:
    """Watch while things happen, one at every wait; return what was shown."""
    output = io.StringIO()
    waits = iter(happens)
    watch(path, Console(file=output, width=200), wait=lambda seconds: next(waits)())
    return output.getvalue().splitlines()


def test_it_shows_what_happens_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    lines: list[dict[str, Any]] = [
        {"event": "run", "step": 0, "stage": "start", **START},
        {"event": "evaluation", "step": 0, "stage": "start", "stage_ended": True, "scores": SCORES},
        {"event": "step", "step": 4, "stage": "a", **STEP},
        {"event": "step", "step": 4, "stage": "a", **STEP, "loss": None},
        {"event": "save", "step": 4, "stage": "a", "seconds": 2.0, "failed": False},
        {"event": "save", "step": 4, "stage": "a", "seconds": 2.0, "failed": True},
        {"event": "refresh", "step": 4, "stage": "a"},
        {"event": "evaluation", "step": 4, "stage": "a", "stage_ended": True, "scores": SCORES},
        {"event": "end", "step": 4, "stage": "a"},
    ]

    def write() -> None:
        path.parent.mkdir()
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    assert shown(path, [lambda: None, write]) == [
        f"waiting for {path}",
        "the run begins: 4 steps, 2 ranks",
        "before training: sums 0.500  chat 1.250",
        "step 4/4  a  loss 1.500  isolated 25.00%",
        "step 4/4  a  loss nan  isolated 25.00%",
        "checkpoint of step 4 saved, 2.0 s",
        "checkpoint of step 4 could not be saved, 2.0 s",
        "after a: sums 0.500  chat 1.250",
        "the run has ended, and its model is exported",
    ]
    # Of one that has ended, all of it at once.
    assert len(shown(path, [])) == 8


def test_silence_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"event": "run", "step": 0, "stage": "a", **START}) + "\n")

    def end() -> None:
        with path.open("a") as more:
            more.write(json.dumps({"event": "end", "step": 4, "stage": "a"}) + "\n")

    said = shown(path, [*[lambda: None] * 1500, end])
    assert [line for line in said if "nothing new" in line] == [
        "nothing new for 300 s: a long evaluation or save, or the run was stopped"
    ]
