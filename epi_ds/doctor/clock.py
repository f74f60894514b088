"""How far apart the clocks of the nodes are. Nothing computes with it, but people compare logs."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from epi_ds.doctor.finding import Finding, Level, Subject
from epi_ds.doctor.team import Team

_ROUNDS = 10
_TOLERATED_SECONDS = 2.0


class Offset(NamedTuple):
    """A node's clock against that of rank 0."""

    seconds: float
    """Ahead of rank 0's."""
    uncertainty: float
    """Half of the quickest round trip, in seconds."""


def clock(team: Team) -> list[Finding]:
    """Ask every node in turn what time it is. Collective; rank 0 returns findings, none for a single node."""
    offsets: dict[str, Offset] = {}
    for node, leader in team.leaders.items():
        if leader == 0:
            continue
        if team.rank == 0:
            offsets[node] = _ask(leader)
        elif team.rank == leader:
            _answer()
    return judged(offsets)


def judged(offsets: dict[str, Offset]) -> list[Finding]:
    """Return what is to be said of clocks, for other nodes than rank 0's."""
    if not offsets:
        return []
    far = {node: offset for node, offset in offsets.items() if abs(offset.seconds) > _TOLERATED_SECONDS}
    if far:
        remedy = "switch on NTP or chrony there: times in logs, and of the end of a job, are of different clocks"
        return [
            Finding(Level.WARN, Subject.CLOCK, f"{offset.seconds:+.1f} s off rank 0's", remedy, nodes=(node,))
            for node, offset in far.items()
        ]
    largest = max(offsets.values(), key=lambda offset: abs(offset.seconds))
    measured = f"{abs(largest.seconds) * 1e3:.1f} ms, give or take {largest.uncertainty * 1e3:.1f}"
    return [Finding(Level.OK, Subject.CLOCK, "the farthest from rank 0's", measured=measured)]


def _ask(other: int) -> Offset:
    answers = []
    theirs = torch.zeros(1, dtype=torch.int64)
    for _ in range(_ROUNDS):
        sent = time.time_ns()
        dist.send(theirs, other)
        dist.recv(theirs, other)
        came = time.time_ns()
        # The quicker the round, the nearer the answer lies to its middle.
        answers.append((came - sent, int(theirs.item()) - (sent + came) // 2))
    round_trip, offset = min(answers)
    return Offset(offset / 1e9, round_trip / 2e9)


def _answer() -> None:
    asked = torch.zeros(1, dtype=torch.int64)
    for _ in range(_ROUNDS):
        dist.recv(asked, 0)
        dist.send(torch.tensor([time.time_ns()]), 0)
