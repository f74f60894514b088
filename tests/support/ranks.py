"""Run a function on N real ranks (gloo, FileStore rendezvous, no ports).

Starting torch, DeepSpeed and a process group costs seconds, so the ranks of a world size are started once per session
and reused. A call that fails or exceeds its time ends its own ranks, and only those; the next call starts new ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from epi_ds.launch.local import remove_buffers
from tests.support.forks import fork_context

# A rank that waits for a peer which failed gets this long before the group is ended.
GRACE_SECONDS = 5.0
GROUP_TIMEOUT = timedelta(seconds=120)


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


def _port(session: int, world_size: int) -> str:
    return f"{session}{world_size}"


def _serve(rank: int, world_size: int, folder: str, port: str, connection: Connection) -> None:
    log = open(f"{folder}/rank_{rank}.log", "w", buffering=1)  # noqa: SIM115 - stdout and stderr for good
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    # Never listened on: the rendezvous below is a file. But DeepSpeed names shared memory by it, and two pools, or two
    # sessions on one machine, would write into each other's.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import torch
    import torch.distributed as dist

    # Imported already where ranks are forks; a fork server keeps to itself what goes wrong with its imports.
    import tests.support.imported  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=GROUP_TIMEOUT,
    )
    while True:
        try:
            module, name, args = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            function = getattr(importlib.import_module(module), name)
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class RankPool:
    """The ranks of one world size."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix=f"ranks_{world_size}_")
        context = fork_context()
        self._processes = []
        self._connections = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world_size, self._folder.name, _port(os.getpid(), world_size), theirs),
                daemon=True,
                name=f"rank{rank}",
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        for connection in self._connections:
            connection.send((function.__module__, function.__qualname__, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            pending = [c for r, c in enumerate(self._connections) if r not in results and r not in failures]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    succeeded, value = connection.recv()
                except EOFError:
                    succeeded, value = False, f"rank {rank} died\n{self._log(rank)}"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            self.end()
            first = min(failures)
            raise RankError(f"rank {first} of {self.world_size}:\n{failures[first]}")
        if len(results) < self.world_size:
            stuck = [rank for rank in range(self.world_size) if rank not in results]
            stacks = self._stacks(stuck)
            self.end()
            raise TimeoutError(f"ranks {stuck} of {self.world_size} did not finish in {timeout} s\n{stacks}")
        return [results[rank] for rank in range(self.world_size)]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        remove_buffers(_port(os.getpid(), self.world_size))
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def _log(self, rank: int, limit: int = 4000) -> str:
        return Path(self._folder.name, f"rank_{rank}.log").read_text()[-limit:]

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR2)
        time.sleep(1.0)
        return "\n".join(f"--- rank {rank}\n{self._log(rank)}" for rank in ranks)


_pools: dict[int, RankPool] = {}


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call a module-level function on every rank; return the results in rank order.

    Arguments and results must pickle. The first rank's traceback is raised as `RankError`, a hang as TimeoutError with
    the stacks of the stuck ranks.
    """
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    try:
        return _pools[world_size].call(function, *args, timeout=timeout)
    except (RankError, TimeoutError):
        del _pools[world_size]
        raise


def end_ranks(world_size: int | None = None) -> None:
    """End the ranks that `run_ranks` started: all of them, or those of one world size."""
    for size in [size for size in _pools if world_size in (None, size)]:
        _pools.pop(size).end()


if __name__ == "__main__":
    sys.exit("import this module")
