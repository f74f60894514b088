"""Whether ranks reach each other: an all_reduce whose result is known, over gloo and by the accelerators' own means."""

from __future__ import annotations

import os
import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from epi_ds.doctor.accelerator import device_type
from epi_ds.doctor.finding import Finding, Level, Subject
from epi_ds.doctor.team import Team, listed

_REPEATS = 20
_INTERFACES = "name the network between nodes by NCCL_SOCKET_IFNAME, and see what NCCL_DEBUG=INFO prints"
_OWN_DEVICES = "show every rank all devices of its node, srun --gpus-per-node=N and not --gpus-per-task"


class _Trial(NamedTuple):
    """What one rank saw of an all_reduce."""

    milliseconds: float
    problem: str
    """Empty where the result was right."""


def reach(team: Team) -> list[Finding]:
    """Reduce over gloo. Collective; rank 0 returns findings."""
    trials = team.gather(_all_reduce(team, torch.device("cpu"), group=None))
    return _told(team, "gloo", trials, remedy="look at the network of these nodes: it changes what it carries")


def accelerator_reach(team: Team) -> list[Finding]:
    """Reduce on the accelerators, by NCCL on CUDA, where training uses them. Collective; rank 0 returns findings."""
    kind = device_type()
    if kind == "cpu":
        return []
    # Every rank gets as far as the others before any waits for them on the device.
    chosen = team.gather(_choose_device(team.local_rank))
    if any(trial.problem for trial in chosen):
        return _told(team, kind, chosen, remedy=_OWN_DEVICES)
    device = torch.device(kind, team.local_rank)
    backend = dist.get_default_backend_for_device(device)
    # Have NCCL wait in this thread and raise, where otherwise a thread of its own ends the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        # Less than over gloo, by which the others hear of it.
        trial = _all_reduce(team, device, group=dist.new_group(backend=backend, timeout=team.timeout / 2))
    except RuntimeError as error:
        trial = _Trial(0.0, str(error).partition("\n")[0])
    return _told(team, backend.upper(), team.gather(trial), remedy=_INTERFACES)


def _choose_device(local_rank: int) -> _Trial:
    try:
        torch.accelerator.set_device_index(local_rank)
    except RuntimeError as error:
        seen = torch.accelerator.device_count()
        return _Trial(0.0, f"LOCAL_RANK={local_rank}, and it sees {seen} devices: {str(error).partition(chr(10))[0]}")
    return _Trial(0.0, "")


def _all_reduce(team: Team, device: torch.device, *, group: dist.ProcessGroup | None) -> _Trial:
    expected = sum(range(1, len(team.nodes) + 1))
    seconds = []
    for _ in range(_REPEATS):
        value = torch.tensor([team.rank + 1], device=device)
        started = time.perf_counter()
        dist.all_reduce(value, group=group)
        # Waits for the device, too.
        result = int(value.item())
        seconds.append(time.perf_counter() - started)
        if result != expected:
            return _Trial(0.0, f"an all_reduce gave {result} where {expected} is right")
    return _Trial(statistics.median(seconds) * 1e3, "")


def _told(team: Team, transport: str, trials: list[_Trial], *, remedy: str) -> list[Finding]:
    """Return rank 0's findings of what all ranks saw."""
    if team.rank != 0:
        return []
    ranks_of: dict[str, list[int]] = {}
    for rank, trial in enumerate(trials):
        if trial.problem:
            ranks_of.setdefault(trial.problem, []).append(rank)
    if ranks_of:
        return [_failed(team, transport, problem, ranks, remedy) for problem, ranks in ranks_of.items()]
    nodes = list(team.leaders)
    alone = f"all on {nodes[0]} (nothing between nodes was tried)"
    where = f"on {len(nodes)} nodes ({listed(nodes)})" if len(nodes) > 1 else alone
    said = f"{transport}: {len(team.nodes)} ranks reach each other, {where}"
    return [Finding(Level.OK, Subject.RANKS, said, measured=f"an all_reduce takes {trials[0].milliseconds:.2f} ms")]


def _failed(team: Team, transport: str, problem: str, ranks: list[int], remedy: str) -> Finding:
    nodes = tuple(dict.fromkeys(team.nodes[rank] for rank in ranks))
    who = listed([f"rank {rank}" for rank in ranks])
    return Finding(Level.FAIL, Subject.RANKS, f"{transport}: {who}: {problem}", remedy, nodes=nodes)
