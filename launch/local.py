"""Start the ranks of one machine under the deepspeed launcher."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from epi_ds.errors import UserError
from epi_ds.launch.environment import prepare_environment
from epi_ds.launch.lost_ranks import die_with_parent, signal_of
from epi_ds.launch.stop_signals import REQUEUE_EXIT_CODE

logger = logging.getLogger(__name__)

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def free_port() -> int:
    """Return a TCP port that is free now, so that several jobs can run on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def device_ids(num_ranks: int) -> list[int | str]:
    """Return the devices of this machine that ``num_ranks`` ranks use, one each: those the user left visible.

    Ranks on the CPU have no devices, so theirs are mere numbers. Imports torch. Raises ValueError where there are fewer
    devices than ranks.
    """
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return list(range(num_ranks))
    found = torch.accelerator.device_count()
    if num_ranks > found:
        raise UserError(
            f"ranks: {num_ranks}, but this machine shows {found} devices and every rank needs its own; set "
            f"ranks={found}, or hide the devices (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    # Numbers or UUIDs. The node launcher sets the variable anew, so without this a job would move to others' devices.
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [int(name) if name.isdigit() else name for name in visible[:num_ranks]] or list(range(num_ranks))


def launch_command(module: str, arguments: Sequence[str], *, devices: Sequence[int | str], port: int) -> list[str]:
    """Return the command that runs ``python -m module arguments`` in one rank per device.

    This is the node launcher that ``deepspeed`` itself starts. Going through the ``deepspeed`` command would put a
    process in between that dies of a signal without passing it on, and leaves the ranks behind.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(devices)}).encode()).decode()
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
        # Its errors say again what ranks have said, and of a run that was told to stop that it failed.
        "--log_level=critical",
        "--module",
        module,
        *arguments,
    ]


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command that does not outlive this process: a killed parent leaves no rank behind on the devices."""
    return subprocess.Popen(command, preexec_fn=partial(die_with_parent, signal.SIGTERM), **options)


def remove_buffers(port: int) -> None:
    """Remove what DeepSpeed's ranks on the CPU leave in shared memory: 69 MB each, which nobody unlinks (0.19.8).

    port  that they met at, by which they name it
    """
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)


class Stop:
    """Passes on what tells this process to end. What it started goes on until it has saved."""

    def __init__(self, pass_on: Callable[[bool], None]) -> None:
        """``pass_on`` is called with whether it is a second Ctrl-C, upon which all is to end at once."""
        self._pass_on = pass_on
        self.told = False
        self._interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM, SIGHUP and SIGUSR1 while the block runs."""
        previous = {number: signal.signal(number, self._note) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.told = True
        self._pass_on(number == signal.SIGINT and self._interrupted)
        if number == signal.SIGINT and not self._interrupted:
            self._interrupted = True
            print("saving a checkpoint and stopping; Ctrl-C again stops at once", file=sys.stderr)


def signal_ranks(launcher: int, number: signal.Signals) -> None:
    """Send a signal to a launcher's ranks: not through it, which tells one after the other, and gives each 30 s."""
    with suppress(psutil.Error):
        process = psutil.Process(launcher)
        # Where there are no ranks yet, the launcher has nothing to wait for.
        for one in process.children() or [process]:
            with suppress(psutil.Error):
                one.send_signal(number)


def run_ranks(module: str, arguments: Sequence[str], *, num_ranks: int) -> int:
    """Run a module in ``num_ranks`` ranks of this machine and return the exit code.

    SIGTERM, SIGUSR1, SIGHUP and SIGINT reach the ranks as SIGTERM, upon which those that listen save and end. A second
    SIGINT ends all of them at once.
    """
    prepare_environment()
    environment, port = os.environ.copy(), free_port()
    # Of this process, which may be confined to some of the machine's.
    cores = len(os.sched_getaffinity(0))
    # Without this every rank starts as many threads as the machine has cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    if environment.get("DS_ACCELERATOR") == "cpu" and num_ranks > cores:
        logger.warning(
            "%d ranks share %d cores, and take turns: a step takes as long as with ranks=%d, and more memory",
            num_ranks,
            cores,
            cores,
        )
    # Slurm sends SIGUSR1 to all processes of a task, and would end DeepSpeed's launcher, which does not know it. Those
    # that start while it is ignored go on ignoring it, until they listen as ranks do.
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        process = start_child(
            launch_command(module, arguments, devices=device_ids(num_ranks), port=port),
            env=environment,
            # A terminal's Ctrl-C reaches the whole foreground group; the ranks must get it once, through this process.
            start_new_session=True,
        )
        stop = Stop(lambda is_last: signal_ranks(process.pid, signal.SIGKILL if is_last else signal.SIGTERM))
        with stop.listening():
            exit_code = process.wait()
    finally:
        remove_buffers(port)
        signal.signal(signal.SIGUSR1, previous)
    if stop.told and signal_of(exit_code) is signal.SIGTERM:
        # Before it listened, a rank has nothing to save.
        return REQUEUE_EXIT_CODE
    return exit_code
