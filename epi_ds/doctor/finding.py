"""What a check says, and how bad that is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import NamedTuple


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """Training works, but for what the finding names."""
    FAIL = "FAIL"
    """Training does not work, or hangs."""


class Subject(StrEnum):
    """What was looked at, in the order in which it is told."""

    SOFTWARE = "software"
    ACCELERATOR = "accelerator"
    COMPILER = "compiler"
    KERNELS = "kernels"
    OPERATORS = "operators"
    LOCKS = "locks"
    MEMORY = "memory"
    RANKS = "ranks"
    CLOCK = "clock"
    FOLDER = "folder"
    SLURM = "Slurm"
    MPI = "MPI"


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    subject: Subject
    said: str
    remedy: str = ""
    measured: str = ""
    """What differs between nodes that are alike, such as free memory: no part of what nodes are compared by."""
    nodes: tuple[str, ...] = ()
    """The nodes of which it is said; empty for all of them."""


class Check(NamedTuple):
    """Something to look at on one node."""

    subject: Subject
    run: Callable[[], list[Finding]]


class CheckFailedError(RuntimeError):
    """A check cannot go on; its finding says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.said)
        self.finding = finding


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among findings; OK for none."""
    levels = list(Level)
    return max((finding.level for finding in findings), key=levels.index, default=Level.OK)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings by subject; those of one subject stay as they came."""
    subjects = list(Subject)
    return sorted(findings, key=lambda finding: subjects.index(finding.subject))


def to_json(findings: Iterable[Finding]) -> str:
    """Return one JSON object: the worst level, and the findings."""
    found = list(findings)
    return json.dumps({"level": worst(found), "findings": [finding._asdict() for finding in found]})


def from_json(text: str) -> list[Finding]:
    """Return the findings of `to_json`."""
    return [
        Finding(
            level=Level(row["level"]),
            subject=Subject(row["subject"]),
            said=row["said"],
            remedy=row["remedy"],
            measured=row["measured"],
            nodes=tuple(row["nodes"]),
        )
        for row in json.loads(text)["findings"]
    ]
