"""Start the ranks of one machine under the deepspeed launcher."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from epi_ds.launch.environment import prepare_environment


def free_port() -> int:
    """Return a TCP port that is free now, so that several jobs can run on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch_command(module: str, arguments: Sequence[str], *, num_ranks: int, port: int) -> list[str]:
    """Return the command that runs ``python -m module arguments`` in ``num_ranks`` ranks.

    This is the node launcher that ``deepspeed`` itself starts. Going through the ``deepspeed`` command would put a
    process in between that dies of a signal without passing it on, and leaves the ranks behind.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(num_ranks))}).encode()).decode()
    return [
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        "--node_rank=0",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--no_local_rank",
        "--log_level=warning",
        "--module",
        module,
        *arguments,
    ]


def run_ranks(module: str, arguments: Sequence[str], *, num_ranks: int) -> int:
    """Run a module in ``num_ranks`` ranks of this machine and return the exit code.

    SIGINT and SIGTERM are passed on to the launcher, which ends all ranks.
    """
    prepare_environment()
    environment = os.environ.copy()
    # Without this every rank starts as many threads as the machine has cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    process = subprocess.Popen(
        launch_command(module, arguments, num_ranks=num_ranks, port=free_port()),
        env=environment,
        # A terminal's Ctrl-C reaches the whole foreground group; the ranks must get it once, through the launcher.
        start_new_session=True,
    )

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
