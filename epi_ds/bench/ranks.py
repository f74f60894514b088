"""Run a function on several processes of this machine that form a process group over gloo. No ports."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from epi_ds.launch.local import remove_buffers
from epi_ds.launch.teardown import skip_teardown

# A rank that fails leaves the others waiting in a collective; they give up after this long.
_TIMEOUT = timedelta(minutes=5)


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call a module-level function on every rank; return the results in rank order.

    Arguments and results must pickle. Raises the first error of a rank.
    """
    with tempfile.TemporaryDirectory(prefix="epi_ds_bench_") as folder:
        start: Any = start_processes
        try:
            start(_run, (world_size, folder, function, args), nprocs=world_size, start_method="spawn")
        finally:
            remove_buffers(os.getpid())
        return [torch.load(_result_path(folder, rank), weights_only=False) for rank in range(world_size)]


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"result_{rank}.pt"


def _run(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # Never listened on, since the rendezvous is a file; DeepSpeed names shared memory by it, which two runs on one
    # machine must not share.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(os.getppid()))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    # Standard output is for the one result.
    os.dup2(2, 1)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        torch.save(function(*args), _result_path(folder, rank))
    finally:
        dist.destroy_process_group()
    skip_teardown(0)
