"""Ranks that may be killed: fresh ones for every fault, started from a process that has imported everything already."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.launch.local import remove_buffers
from tests.support.forks import fork_context

# How long a collective waits for a rank that is stopped, and how long ranks may take to end after another one has.
GROUP_SECONDS = 15.0
END_SECONDS = 30.0
_started = 0


class Ended(NamedTuple):
    """How one rank ended."""

    value: Any
    """What its function returned; None where it did not return."""
    error: str
    """Traceback of what it raised."""
    exit_code: int | None
    """Negative: a signal. None: it was still running when its time was over."""


def _serve(
    rank: int, world_size: int, folder: str, port: str, name: str, args: tuple[Any, ...], to: Connection
) -> None:
    log = os.open(f"{folder}/rank_{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    # Never listened on: the rendezvous is a file. DeepSpeed names shared memory by it.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    try:
        module, _, function = name.rpartition(".")
        to.send((getattr(importlib.import_module(module), function)(*args), ""))
    except BaseException:
        to.send((None, traceback.format_exc()))
        os._exit(1)
    os._exit(0)


class Ranks:
    """Ranks of one world size, for one call."""

    def __init__(self, function: Callable[..., Any], world_size: int, *args: Any) -> None:
        global _started
        _started += 1
        self._folder = tempfile.TemporaryDirectory(prefix="faults_")
        self._port = f"{os.getpid()}{_started}"
        context = fork_context()
        self._connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            name = f"{function.__module__}.{function.__qualname__}"
            given = (rank, world_size, self._folder.name, self._port, name, args, theirs)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)

    def wait(self, timeout: float = 120.0) -> list[Ended]:
        """Wait for all ranks; once one has ended by a signal or an error, the others have `END_SECONDS` left."""
        results: dict[int, tuple[Any, str]] = {}
        deadline, failed = time.monotonic() + timeout, False
        while time.monotonic() < deadline:
            for rank, connection in enumerate(self._connections):
                with contextlib.suppress(EOFError, OSError):
                    if rank not in results and connection.poll():
                        results[rank] = connection.recv()
            codes = [process.exitcode for process in self.processes]
            if all(code is not None for code in codes):
                break
            if not failed and any(code not in (None, 0) for code in codes):
                failed, deadline = True, time.monotonic() + END_SECONDS
            time.sleep(0.02)
        for rank, connection in enumerate(self._connections):
            with contextlib.suppress(EOFError, OSError):
                if rank not in results and connection.poll():
                    results[rank] = connection.recv()
        ended = [Ended(*results.get(rank, (None, "")), process.exitcode) for rank, process in enumerate(self.processes)]
        self._end()
        return ended

    def log(self, rank: int) -> str:
        """What a rank printed so far."""
        return Path(self._folder.name, f"rank_{rank}.log").read_text(errors="replace")

    def _end(self) -> None:
        for process in self.processes:
            if process.is_alive():
                # A stopped process does not hear a signal but this one.
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        remove_buffers(self._port)
        with contextlib.suppress(OSError):
            self._folder.cleanup()
