"""What nodes say of themselves, as one report: what they share once, what they do not with their names."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from epi_ds.doctor.finding import Finding, Level

_ALIKE = "nodes differ in this: give all of them the same environment and hardware"


class Said(NamedTuple):
    """The findings of one node."""

    node: str
    findings: Sequence[Finding]


def node_name() -> str:
    """Return what this node is called: by Slurm, where it has started this process, else by itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def named(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings as those of this node, where they are of no other."""
    return [finding._replace(nodes=finding.nodes or (node_name(),)) for finding in findings]


def merged(nodes: Sequence[Said]) -> list[Finding]:
    """Return each finding once, with the nodes of which it is said where it is not all of them.

    What is well on every node, but not in the same words, is a warning: another release of torch, another compiler.
    What nodes measure is told of the first one.
    """
    nodes_of: dict[Finding, list[str]] = {}
    measured_of: dict[Finding, str] = {}
    for node, findings in nodes:
        for finding in findings:
            key = finding._replace(measured="")
            nodes_of.setdefault(key, []).append(node)
            where = f" on {node}" if finding.measured and len(nodes) > 1 else ""
            measured_of.setdefault(key, f"{finding.measured}{where}")
    troubled = {(finding.subject, node) for node, findings in nodes for finding in findings if _is_trouble(finding)}
    found = []
    for key, those in nodes_of.items():
        finding = key._replace(measured=measured_of[key])
        others = [node for node, _ in nodes if node not in those]
        if others:
            finding = finding._replace(nodes=tuple(those))
        # Where other nodes are worse off, they say so themselves.
        if not _is_trouble(finding) and any((finding.subject, node) not in troubled for node in others):
            finding = finding._replace(level=Level.WARN, remedy=_ALIKE)
        found.append(finding)
    return found


def _is_trouble(finding: Finding) -> bool:
    return finding.level is not Level.OK
