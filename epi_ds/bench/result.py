"""What a benchmark gives back, and how it prints: one JSON object, or a page of docs/measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


class BenchResult(NamedTuple):
    """Rows of figures, and what they were measured on."""

    machine: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, Any]]

    def to_json(self) -> str:
        """Return one JSON object on one line."""
        return json.dumps(self._asdict())

    def to_markdown(self, command: str) -> str:
        """Return a page: what was measured by which command, on what, and the rows as a table.

        A page says all that its figures depend on, so that they can be measured again and compared.
        """
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items() if value is not None)
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"# {command}",
            "",
            f"Machine: {machine}. Versions: {versions}.",
            "",
            "```",
            command,
            "```",
            "",
        ]
        if self.rows:
            lines += [_row_of([heading_of(name) for name in self.rows[0]]), _row_of(["---"] * len(self.rows[0]))]
            lines += [_row_of([shown(name, value) for name, value in row.items()]) for row in self.rows]
        return "\n".join(lines)


def heading_of(name: str) -> str:
    """Return what a table calls a column of a row. Bytes are shown as megabytes."""
    return name.replace("_bytes", "_MB").replace("_", " ")


def shown(name: str, value: Any) -> str:
    """Return a value as a table shows it; parts of a whole are a line each."""
    if "_bytes" in name:
        return f"{value / 1e6:.3f}"
    if isinstance(value, dict):
        return "\n".join(f"{shown(part, number)} {part}" for part, number in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("\n", ", ").replace("|", "\\|") for cell in cells) + " |"


def result_of(rows: Sequence[Mapping[str, Any]]) -> BenchResult:
    """Put rows together with this machine's description."""
    machine = {
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return BenchResult(machine, versions, [dict(row) for row in rows])


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor()
