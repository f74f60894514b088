"""Run processes side by side, each once what it needs is there, and never two that make the same file."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from epi_ds.launch.local import start_child

_POLL_SECONDS = 0.1
_KIBIBYTE = 1024


@dataclass(frozen=True)
class Job:
    """A command, its files, and what becomes of it."""

    name: str
    command: Sequence[str]
    environment: Callable[[], Mapping[str, str]]
    """Asked for as it starts: a port is free now, and not for hours."""
    log: Path
    """Where its output goes."""
    ended: Callable[[Ended], None]
    """Called in this process once it has ended."""
    needs: tuple[Path, ...] = ()
    """It is started only where these exist."""
    makes: tuple[Path, ...] = ()
    """No other job that makes one of these runs beside it."""
    begins: Callable[[], None] = field(default=lambda: None)
    """Called before it starts."""


class Ended(NamedTuple):
    """The end of a job."""

    exit_code: int | None
    """None where it was not started, because nobody made what it needs."""
    seconds: float
    peak_bytes: int | None
    """Largest resident memory of its process."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float


def run_jobs(jobs: Sequence[Job], *, side_by_side: int, started: Callable[[Job], None]) -> None:
    """Run all jobs in their order, ``side_by_side`` at a time; where one has to wait, the next ones go first.

    A job whose needs nobody makes any more ends without a start. KeyboardInterrupt and other errors end what runs, as
    SIGTERM does: runs save.
    """
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            while len(running) < side_by_side and (job := _next(waiting, running)) is not None:
                waiting.remove(job)
                started(job)
                running.append(_start(job))
            if not running:
                for job in waiting:
                    job.ended(Ended(None, 0.0, None))
                return
            for one in list(running):
                if (ended := _poll(one)) is not None:
                    running.remove(one)
                    one.job.ended(ended)
            time.sleep(_POLL_SECONDS)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _next(waiting: Sequence[Job], running: Sequence[_Running]) -> Job | None:
    made_now = {path for one in running for path in one.job.makes}
    return next(
        (job for job in waiting if all(p.exists() for p in job.needs) and not made_now.intersection(job.makes)), None
    )


def _start(job: Job) -> _Running:
    job.begins()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        process = start_child(job.command, env=dict(job.environment()), stdout=log, stderr=subprocess.STDOUT)
    return _Running(job, process, time.monotonic())


def _poll(one: _Running) -> Ended | None:
    # Popen's own poll throws the usage away.
    pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
    if pid == 0:
        return None
    one.process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(one.process.returncode, time.monotonic() - one.started, usage.ru_maxrss * _KIBIBYTE)
