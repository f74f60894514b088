"""Run processes side by side, each once what it needs is there, and never two that make the same file.

Not in several commands either: what a job makes is locked while it runs.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from epi_ds.launch.local import start_child
from epi_ds.study.maker_locks import take_locks

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
    """Where one is missing as it starts, no other job that makes it runs beside it, in another command neither."""
    only_makes: bool = False
    """Once they are there it is left out, and ``ended`` is not called."""
    begins: Callable[[], None] = field(default=lambda: None)
    """Called before it starts."""

    @property
    def unmade(self) -> tuple[Path, ...]:
        """What is missing of what it makes."""
        return tuple(path for path in self.makes if not path.exists())

    @property
    def is_superfluous(self) -> bool:
        """Whether there is nothing left for it to do."""
        return self.only_makes and not self.unmade


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
    locks: ExitStack


class _Startable(NamedTuple):
    job: Job
    locks: ExitStack


def run_jobs(jobs: Sequence[Job], *, side_by_side: int, started: Callable[[Job], None]) -> None:
    """Run all jobs in their order, ``side_by_side`` at a time; where one has to wait, the next ones go first.

    A job whose needs nobody makes any more ends without a start. KeyboardInterrupt and other errors end what runs, as
    SIGTERM does: runs save.
    """
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            while len(running) < side_by_side and (found := _next(waiting, running)) is not None:
                waiting.remove(found.job)
                started(found.job)
                running.append(_start(found))
            waiting = [job for job in waiting if not job.is_superfluous]
            # What is ready and did not start is being made by another command, or was until now.
            if not running and not any(_is_ready(job) for job in waiting):
                for job in waiting:
                    job.ended(Ended(None, 0.0, None))
                return
            for one in list(running):
                if (ended := _poll(one)) is not None:
                    running.remove(one)
                    one.locks.close()
                    one.job.ended(ended)
            time.sleep(_POLL_SECONDS)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
            one.locks.close()


def _is_ready(job: Job) -> bool:
    return all(path.exists() for path in job.needs)


def _next(waiting: Sequence[Job], running: Sequence[_Running]) -> _Startable | None:
    """Return the first job that can start, with the locks on what it makes."""
    made_now = {path for one in running for path in one.job.makes}
    for job in waiting:
        if not _is_ready(job) or job.is_superfluous or made_now.intersection(job.unmade):
            continue
        locks = take_locks(job.unmade)
        if locks is None:
            continue
        if not job.only_makes or job.unmade:
            return _Startable(job, locks)
        # Another command has made it just now.
        locks.close()
    return None


def _start(found: _Startable) -> _Running:
    job = found.job
    job.begins()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        process = start_child(job.command, env=dict(job.environment()), stdout=log, stderr=subprocess.STDOUT)
    return _Running(job, process, time.monotonic(), found.locks)


def _poll(one: _Running) -> Ended | None:
    # Popen's own poll throws the usage away.
    pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
    if pid == 0:
        return None
    one.process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(one.process.returncode, time.monotonic() - one.started, usage.ru_maxrss * _KIBIBYTE)
