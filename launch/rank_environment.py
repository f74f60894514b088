"""Which rank this process is, whoever started it.

The deepspeed launcher and torchrun say it in the variables that torch reads. srun and mpirun have variables of their
own, which nothing below us reads: DeepSpeed asks mpi4py then, and overwrites the address while it does. Here they are
put into torch's words, once, before anything is initialised.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

from epi_ds.errors import UserError

# Below the ports that Linux gives to clients, and above those of services.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)


class Source(str, Enum):
    """Whose variables say it."""

    TORCH = "torch"
    MPIRUN = "mpirun"
    SLURM = "Slurm"


class RankEnvironment(NamedTuple):
    """One process's place among the ranks of a run."""

    source: Source
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    """Ranks on this node."""
    master_addr: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """Return what torch, DeepSpeed and accelerate read."""
        found = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_SIZE": self.local_size,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        return {name: str(value) for name, value in found.items()}


def become_rank() -> bool:
    """Put into torch's variables which rank this process is; return whether it is one. Raises as `discover` does."""
    found = discover(os.environ)
    if found is not None and found.source is not Source.TORCH:
        os.environ.update(found.variables())
        if found.master_addr.startswith("127."):
            # All nodes are this host, whose own name gloo would look up, and not find or find elsewhere.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return found is not None


def discover(
    environment: Mapping[str, str], *, resolves: Callable[[str], bool] | None = None, parent: int | None = None
) -> RankEnvironment | None:
    """Return which rank the variables make of this process; None where it is no rank, and may start some.

    resolves  whether a host name has an address; None asks the system
    parent    the process that started this one; None is this one's

    Who started a process last is believed: torch's variables before mpirun's, which runs within srun's steps, before
    Slurm's. ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set. One task of srun or mpirun alone is no
    rank: it may start the ranks of its node. Raises UserError where variables are missing or contradict each other,
    with what was found.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _of_torch(environment)
    if _OPEN_MPI[1] in environment and _number(environment, _OPEN_MPI[1]) > 1:
        return _of_open_mpi(environment, os.getppid() if parent is None else parent)
    # A batch script has a Slurm rank and no step; a step may be of fewer tasks than the job.
    if "SLURM_STEP_ID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return _of_slurm(environment, resolves or _resolves)
    return None


def _of_torch(environment: Mapping[str, str]) -> RankEnvironment:
    missing = [name for name in _TORCH if name not in environment]
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing beside other variables of torch: "
            f"unset these, or start with the deepspeed launcher or torchrun. Found: {_shown(environment, _TORCH)}"
        )
    rank, world_size, local_rank, port = (
        _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    sizes = [_number(environment, name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if name in environment]
    local_size = sizes[0] if sizes else world_size
    if not (rank < world_size and local_rank < local_size <= world_size):
        found = _shown(environment, (*_TORCH, "LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
        raise UserError(
            f"the variables of torch contradict each other: {found}; start with the deepspeed launcher or torchrun"
        )
    return RankEnvironment(Source.TORCH, rank, world_size, local_rank, local_size, environment["MASTER_ADDR"], port)


def _of_open_mpi(environment: Mapping[str, str], parent: int) -> RankEnvironment:
    rank, world_size, local_rank, local_size = (_number(environment, name) for name in _OPEN_MPI)
    # mpirun, or its daemon, is the parent of all ranks of a node.
    host, port = "127.0.0.1", port_of(str(parent))
    if local_size < world_size and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UserError(
            f"mpirun started {world_size} ranks on several nodes, and does not say where the first one is: pass "
            "-x MASTER_ADDR=<its host> -x MASTER_PORT=<a free port>"
        )
    return RankEnvironment(Source.MPIRUN, rank, world_size, local_rank, local_size, *_meeting(environment, host, port))


def _of_slurm(environment: Mapping[str, str], resolves: Callable[[str], bool]) -> RankEnvironment:
    rank, world_size, node, local_rank = (
        _number(environment, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID")
    )
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not (rank < world_size == sum(per_node) and node < len(per_node) and local_rank < per_node[node]):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_LOCALID")
        raise UserError(f"the variables of Slurm contradict each other: {_shown(environment, names)}; start with srun")
    host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if not resolves(host):
        # Where node names mean nothing to the system, the address of srun does: it runs on the job's first node.
        host = environment.get("SLURM_LAUNCH_NODE_IPADDR", host)
    # Another one after each requeue: the port of before may still be held by what is left of the job.
    parts = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    port = port_of("/".join(environment.get(name, "0") for name in parts))
    return RankEnvironment(
        Source.SLURM, rank, world_size, local_rank, per_node[node], *_meeting(environment, host, port)
    )


def _meeting(environment: Mapping[str, str], host: str, port: int) -> tuple[str, int]:
    """Return where ranks meet: where the user says, else here."""
    given = "MASTER_PORT" in environment
    return environment.get("MASTER_ADDR", host), _number(environment, "MASTER_PORT") if given else port


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's ``2(x3),1``. Raises UserError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"{text!r} is no list of tasks per node as Slurm writes it, such as 2(x3),1")
        found += [int(match.group(1))] * int(match.group(2) or 1)
    return found


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's ``rack[07-12,20]-n[1-2],login``, in which only ranges are compressed."""
    first, depth = "", 0
    for character in nodes:
        if character == "," and not depth:
            break
        depth += {"[": 1, "]": -1}.get(character, 0)
        first += character
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def port_of(key: str) -> int:
    """Return a port that is the same for all ranks of a run, and most probably another one for other runs."""
    return _FIRST_PORT + zlib.crc32(key.encode()) % _NUM_PORTS


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise UserError(f"{name} is missing beside the variables that come with it") from None
    except ValueError:
        raise UserError(f"{name} is {environment[name]!r}, and must be a number") from None


def _shown(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={environment.get(name, '(unset)')}" for name in names)
