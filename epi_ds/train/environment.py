"""What a run ran on, and the most memory that it took, as its metrics tell it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from typing import Any

import torch

_LIBRARIES = ("epi-ds", "torch", "deepspeed", "transformers", "trl", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """Return the versions and the machine of this process, by name; what is not installed is left out."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found |= {"host": platform.node(), "system": platform.platform(), "cpu_cores": os.cpu_count()}
    device = _accelerator()
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_memory_bytes": properties.total_memory}
    else:
        found["device"] = "cpu" if device is None else device.type
    return found


def peak_bytes() -> dict[str, int]:
    """Return the most memory of this process so far: of the host what was resident, of an accelerator what was in use.

    Bytes. The host's is the kernel's count, shared libraries and mapped files included.
    """
    # Linux counts kilobytes.
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    device = _accelerator()
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


def _accelerator() -> torch.device | None:
    """Return the accelerator that this process trains on; None on the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    return torch.accelerator.current_accelerator(check_available=True)
