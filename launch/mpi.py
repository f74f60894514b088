"""Start ranks under mpirun, or under srun for programs of MPI."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum

from epi_ds.errors import UserError
from epi_ds.launch.local import Stop, start_child

# What ranks on other nodes are to see of this environment; srun passes all of it by itself.
PASSED = re.compile(
    r"(OMP|DS|HF|EPI_DS|NCCL|GLOO|WANDB|TRITON)_|(CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH|MASTER_ADDR|MASTER_PORT|PATH|"
    r"PYTHONPATH|TORCH_EXTENSIONS_DIR|TRANSFORMERS_OFFLINE|TOKENIZERS_PARALLELISM)$"
)


class Starter(StrEnum):
    """Who starts the ranks."""

    MPIRUN = "mpirun"
    SRUN = "srun"


def mpi_command(
    command: Sequence[str],
    starter: Starter,
    *,
    num_ranks: int,
    environment: Mapping[str, str],
    hosts: str | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """Return the command that runs ``python -m epi_ds.launch.rank`` with ``command`` in every rank.

    environment  whose variables ranks of mpirun on other nodes get
    hosts        of Open MPI's mpirun, such as ``node1:8,node2:8``; None for this machine
    options      further ones of mpirun or srun

    Raises UserError for hosts under srun, which has those of its allocation.
    """
    ranks = [sys.executable, "-u", "-m", "epi_ds.launch.rank", *command]
    if starter is Starter.SRUN:
        if hosts is not None:
            raise UserError(f"--hosts {hosts} would be ignored: srun starts the ranks on the nodes of its job")
        return ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", f"--ntasks={num_ranks}", *options, *ranks]
    passed = [word for name in sorted(environment) if PASSED.match(name) for word in ("-x", name)]
    return [
        "mpirun",
        "-np",
        str(num_ranks),
        *(["--host", hosts] if hosts is not None else []),
        *passed,
        *options,
        *ranks,
    ]


def run(command: Sequence[str]) -> int:
    """Run mpirun or srun and return its exit code. Raises UserError where it is missing.

    SIGTERM, SIGHUP and SIGINT reach the ranks as SIGUSR1, which both pass on. Upon SIGTERM itself they end the ranks,
    without time to save; a second SIGINT does that.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not installed here (Debian, Ubuntu: apt-get install openmpi-bin)")
    # A session of its own: a terminal's Ctrl-C would reach it too.
    process = start_child(command, start_new_session=True)
    stop = Stop(lambda is_last: process.send_signal(signal.SIGTERM if is_last else signal.SIGUSR1))
    with stop.listening():
        return process.wait()
