"""The ranks that came, and how they meet: step by step, so that what fails has a name."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from epi_ds.doctor.finding import CheckFailedError, Finding, Level, Subject
from epi_ds.doctor.nodes import node_name
from epi_ds.launch.rank_environment import RankEnvironment

_RETRY_SECONDS = 0.2


class Team(NamedTuple):
    """All ranks, connected over gloo."""

    rank: int
    local_rank: int
    nodes: list[str]
    """The node of every rank."""
    timeout: timedelta
    """How long ranks wait for each other."""
    store: Store

    @property
    def leaders(self) -> dict[str, int]:
        """The first rank of every node."""
        return {node: self.nodes.index(node) for node in self.nodes}

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.leaders[self.nodes[self.rank]] == self.rank

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank. Collective."""
        values: list[Any] = [None] * len(self.nodes)
        dist.all_gather_object(values, value)
        return values

    def tell(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def meet(place: RankEnvironment, *, seconds: float) -> Store:
    """Return the store of the first rank, which runs in it. Raises CheckFailedError where it is not reached."""
    ended = time.monotonic() + seconds
    # torchrun's own process has the store.
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_listener(place, ended=ended)
    left = timedelta(seconds=max(1.0, ended - time.monotonic()))
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, and not exported for mypy
            place.master_addr,
            place.master_port,
            place.world_size,
            is_master=serves,
            timeout=left,
            # Otherwise an error would not say which ranks are missing.
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if serves:
            said = f"rank 0 cannot listen on port {place.master_port}: {_first_line(error)}"
            raise _failed(said, "set MASTER_PORT to a free port of rank 0's node") from error
        raise CheckFailedError(unanswered(place)) from error
    # What torchrun's agent keeps there is its own, and of each of its attempts.
    return PrefixStore(f"epi_ds_doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def assemble(place: RankEnvironment, store: Store, *, seconds: float) -> Team:
    """Connect all ranks over gloo. Raises CheckFailedError where some do not come, or do not reach each other."""
    timeout = timedelta(seconds=seconds)
    keys = [f"rank {rank}" for rank in range(place.world_size)]
    store.set(keys[place.rank], node_name())
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [key for key in keys if not store.check([key])]
        came = dict.fromkeys(store.get(key).decode() for key in keys if key not in missing)
        said = f"{len(keys) - len(missing)} of {len(keys)} ranks came within {seconds:.0f} s, on {listed(list(came))}"
        raise _failed(f"{said}; missing: {listed(missing)}", _remedy(place)) from error
    nodes = [store.get(key).decode() for key in keys]
    try:
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    except RuntimeError as error:
        said = f"all ranks came to {_meeting(place)}, but do not reach each other over gloo: {_first_line(error)}"
        raise _failed(said, _remedy(place)) from error
    return Team(place.rank, place.local_rank, nodes, timeout, store)


def unanswered(place: RankEnvironment) -> Finding:
    """Return what is found where somebody listens for ranks, and is not their first one."""
    said = f"what listens at {_meeting(place)} does not answer as rank 0 does"
    return Finding(Level.FAIL, Subject.RANKS, said, _remedy(place))


def _remedy(place: RankEnvironment) -> str:
    return (
        f"MASTER_ADDR={place.master_addr} must be rank 0's node as the others see it, and a firewall pass "
        f"MASTER_PORT={place.master_port} and the ports of clients; where a node has several networks, name the one "
        "between nodes by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (ip -brief address lists them)"
    )


def listed(names: list[str], limit: int = 8) -> str:
    """Return names in a sentence, but no more than a line has room for."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _wait_for_listener(place: RankEnvironment, *, ended: float) -> None:
    """Return when somebody listens where ranks meet. The system's own error says more than a time-out of torch's."""
    while True:
        try:
            left = max(_RETRY_SECONDS, ended - time.monotonic())
            socket.create_connection((place.master_addr, place.master_port), timeout=left).close()
        except OSError as error:
            # Rank 0 may come later.
            if time.monotonic() >= ended:
                said = f"rank {place.rank} does not reach rank 0 at {_meeting(place)}: {error}"
                raise _failed(said, _remedy(place)) from error
            time.sleep(_RETRY_SECONDS)
        else:
            return


def _meeting(place: RankEnvironment) -> str:
    return f"{place.master_addr}:{place.master_port}"


def _failed(said: str, remedy: str) -> CheckFailedError:
    return CheckFailedError(Finding(Level.FAIL, Subject.RANKS, said, remedy))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
