"""What a benchmark gives back, and the one JSON object that it prints."""

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
