"""Processes forked from one that has imported everything, because importing is most of what a short run takes.

Each is a new process with an environment of its own: in everything but its parent it is what a shell or a launcher
starts. What is proved of launchers, of signals and of lost ranks is proved with real commands (`processes`).
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from epi_ds.launch.local import free_port, remove_buffers
from tests.support.processes import Finished

# What DeepSpeed's launcher leaves its ranks between SIGTERM and SIGKILL, once one of them has failed.
GRACE_SECONDS = 30.0


def fork_context() -> mp.context.SpawnContext | mp.context.ForkServerContext:
    """Return what starts processes. On a GPU not by a fork, in which a parent's CUDA cannot be used."""
    if os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imported"])
    return context


def epi_ds(*arguments: str, num_ranks: int | None = None, timeout: float = 300.0) -> Finished:
    """Run ``epi-ds arguments``, or with a number of ranks what each of the ranks runs that it starts."""
    return run_module("epi_ds.cli.main", *arguments, num_ranks=num_ranks, timeout=timeout)


def run_module(module: str, *arguments: str, num_ranks: int | None = None, timeout: float = 300.0) -> Finished:
    """Run ``python -m module arguments`` once, or in ranks, of which all are ended when one fails.

    Returns the exit code of the first that failed, or 0, and what all of them printed. Raises TimeoutError.
    """
    port = free_port()
    environments = [_of_rank(rank, num_ranks, port) for rank in range(num_ranks)] if num_ranks else [dict(os.environ)]
    with tempfile.NamedTemporaryFile(prefix="forks_", suffix=".log") as log:
        processes: list[BaseProcess] = [
            fork_context().Process(target=_run, args=(module, arguments, environment, os.getcwd(), log.name))
            for environment in environments
        ]
        try:
            for process in processes:
                process.start()
            exit_code = _first_failure(processes, timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
            remove_buffers(port)
        output = Path(log.name).read_text(errors="replace")
    if exit_code is None:
        raise TimeoutError(f"{module} {arguments} did not end in {timeout} s; its output:\n{output[-8000:]}")
    return Finished(exit_code, output)


def _of_rank(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return this process's environment with what DeepSpeed's launcher gives a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_SIZE": num_ranks, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def _first_failure(processes: Sequence[BaseProcess], timeout: float) -> int | None:
    """Wait for the end of all; return the exit code of the first that failed, 0 for none, None when time is over."""
    deadline, failure = time.monotonic() + timeout, 0
    while alive := [process for process in processes if process.exitcode is None]:
        if (left := deadline - time.monotonic()) <= 0:
            return failure or None
        wait([process.sentinel for process in alive], timeout=left)
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed and not failure:
            failure = failed[0]
            deadline = time.monotonic() + GRACE_SECONDS
            for process in alive:
                process.terminate()
    return failure


def _run(module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str, log: str) -> None:
    # Here too, because a fork server keeps to itself what goes wrong with its imports.
    import tests.support.imported  # noqa: F401

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # Appended to, so that ranks do not write over each other.
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    # As with python -u, without which a process that dies takes along what it has said.
    sys.stdout.reconfigure(write_through=True)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    with _left_as_python_does():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def _left_as_python_does() -> Iterator[None]:
    """A forked process leaves without what libraries have registered for the end."""
    try:
        yield
    finally:
        atexit._run_exitfuncs()
