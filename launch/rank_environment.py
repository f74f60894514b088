"""Which rank this process is, whoever started it.

The deepspeed launcher and torchrun say it in the variables that torch reads. srun and mpirun have variables of their
own, which nothing below us reads: DeepSpeed asks mpi4py then, and overwrites the address while it does. Here they are
put into torch's words, once, before anything is initialised. mpi4py is asked for one thing only: where the first rank
is, if mpirun has started ranks on several nodes.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from enum import StrEnum
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


# MPICH, Intel MPI and others that Hydra starts.
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# What shows that a launcher of torch's or DeepSpeed's set torch's variables, not a batch script for all tasks alike.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
_ONE_NODE = "127.0.0.1"


class Source(StrEnum):
    """Whose variables say it."""

    TORCH = "torch"
    MPIRUN = "mpirun"
    SLURM = "Slurm"
    NOBODY = "nobody"


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


class Meeting(NamedTuple):
    """Where ranks find each other: at the first one."""

    host: str
    port: int


def become_rank() -> RankEnvironment | None:
    """Put into torch's variables which rank this process is; return it, None for no rank. Raises as `discover` does."""
    found = discover(os.environ)
    if found is not None and found.source is not Source.TORCH:
        os.environ.update(found.variables())
        if found.master_addr.startswith("127."):
            # All nodes are this host, whose own name gloo would look up, and not find or find elsewhere.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return found


def only_rank() -> RankEnvironment:
    """Return the environment of a run of one rank, which meets nobody."""
    # The parent's number differs between jobs of a node, which is all that a port of one's own needs.
    return RankEnvironment(Source.NOBODY, 0, 1, 0, 1, _ONE_NODE, port_of(f"{os.getppid()}/{os.getpid()}"))


def discover(
    environment: Mapping[str, str],
    *,
    resolves: Callable[[str], bool] | None = None,
    parent: int | None = None,
    ask_mpi: Callable[[], Meeting | None] | None = None,
) -> RankEnvironment | None:
    """Return which rank the variables make of this process; None where it is no rank, and may start some.

    resolves    whether a host name has an address; None asks the system
    parent      the process that started this one; None is this one's
    ask_mpi     asks the ranks of mpirun where they meet, None where nobody can say; None asks mpi4py

    Who started a process last is believed: torch's variables before mpirun's, which runs within srun's steps, before
    Slurm's. ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set. One task of srun or mpirun alone is no
    rank: it may start the ranks of its node. Raises UserError where variables are missing or contradict each other,
    with what was found.
    """
    # A batch script has a Slurm rank and no step; a step may be of fewer tasks than the job.
    is_task = "SLURM_STEP_ID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS") > 1
    if "RANK" in environment or "WORLD_SIZE" in environment:
        found = _of_torch(environment)
        if is_task:
            _check_not_of_the_script(environment, found)
        return found
    for names in (_OPEN_MPI, _HYDRA):
        # srun sets PMI_RANK too, and says more by itself.
        if names[0] in environment and names[2] in environment and _number(environment, names[1]) > 1:
            return _of_mpirun(
                environment,
                names,
                parent=os.getppid() if parent is None else parent,
                ask_mpi=ask_mpi or _ask_mpi4py,
            )
    return _of_slurm(environment, resolves or _resolves) if is_task else None


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


def _check_not_of_the_script(environment: Mapping[str, str], found: RankEnvironment) -> None:
    """Raise UserError where a batch script exported torch's variables, which are then the same for all tasks."""
    if not any(name in environment for name in _LAUNCHED) and found.rank != _number(environment, "SLURM_PROCID"):
        names = (*_TORCH, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        raise UserError(
            f"the variables of torch and of Slurm contradict each other: {_shown(environment, names)}; unset RANK, "
            "WORLD_SIZE and LOCAL_RANK in the batch script, they follow from Slurm's"
        )


def _of_mpirun(
    environment: Mapping[str, str], names: tuple[str, ...], *, parent: int, ask_mpi: Callable[[], Meeting | None]
) -> RankEnvironment:
    rank, world_size, local_rank, local_size = (_number(environment, name) for name in names)
    if not (rank < world_size and local_rank < local_size <= world_size):
        raise UserError(f"the variables of mpirun contradict each other: {_shown(environment, names)}")
    if local_size == world_size:
        # mpirun, or its daemon, is the parent of all ranks of a node.
        meeting = Meeting(_ONE_NODE, port_of(str(parent)))
    elif {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        meeting = Meeting("", 0)
    elif (asked := ask_mpi()) is not None:
        meeting = asked
    else:
        raise UserError(
            f"mpirun started {world_size} ranks on several nodes, and does not say where the first one is: install "
            "mpi4py (epi-ds[mpi]), which finds out, or pass -x MASTER_ADDR=<its host> -x MASTER_PORT=<a free port>"
        )
    return RankEnvironment(Source.MPIRUN, rank, world_size, local_rank, local_size, *_meeting(environment, meeting))


def _ask_mpi4py() -> Meeting | None:
    """Return what the first rank tells all others; None without mpi4py. Collective."""
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    with socket.socket() as probe:
        probe.bind(("", 0))
        own = Meeting(_own_address(), probe.getsockname()[1])
    meeting: Meeting = MPI.COMM_WORLD.bcast(own)
    return meeting


def _own_address() -> str:
    """Return an address under which other nodes reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: it only asks which way packets to elsewhere would leave.
            probe.connect(("192.0.2.1", 1))
            address: str = probe.getsockname()[0]
        except OSError:
            # No way to elsewhere, as in a network of compute nodes alone.
            address = socket.gethostbyname(socket.gethostname())
    return address


def _of_slurm(environment: Mapping[str, str], resolves: Callable[[str], bool]) -> RankEnvironment:
    rank, world_size, node, local_rank = (
        _number(environment, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID")
    )
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not (rank < world_size == sum(per_node) and node < len(per_node) and local_rank < per_node[node]):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_LOCALID")
        raise UserError(f"the variables of Slurm contradict each other: {_shown(environment, names)}; start with srun")
    host = first_of(environment.get("SLURM_STEP_NODELIST", ""))
    if not resolves(host):
        # Where node names mean nothing to the system, the address of srun does: it runs on the job's first node.
        host = environment.get("SLURM_LAUNCH_NODE_IPADDR", host)
    # Another one after each requeue: the port of before may still be held by what is left of the job.
    parts = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    port = port_of("/".join(environment.get(name, "0") for name in parts))
    meeting = _meeting(environment, Meeting(host, port))
    return RankEnvironment(Source.SLURM, rank, world_size, local_rank, per_node[node], *meeting)


def _meeting(environment: Mapping[str, str], found: Meeting) -> Meeting:
    """Return where ranks meet: where the user says, else where was found."""
    port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else found.port
    return Meeting(environment.get("MASTER_ADDR", found.host), port)


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's ``2(x3),1``. Raises UserError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"{text!r} is no list of tasks per node as Slurm writes it, such as 2(x3),1")
        found += [int(match.group(1))] * int(match.group(2) or 1)
    return found


def first_of(nodes: str) -> str:
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
