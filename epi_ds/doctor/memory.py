"""Memory of this node, and the shared memory through which its ranks talk."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from epi_ds.doctor.accelerator import device_type
from epi_ds.doctor.finding import Finding, Level, Subject

# DeepSpeed 0.19.8 makes a buffer of 69.2 MB for each rank on the CPU.
SHARED_BYTES_PER_RANK = 70_000_000
# What NVIDIA asks for: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html
SHARED_BYTES_OF_NCCL = 1_000_000_000
# A rank that has imported torch and DeepSpeed, without a model.
_BYTES_PER_RANK = 1_000_000_000
_GIVE_MORE = "containers get 64 MB: docker run --shm-size=2g or --ipc=host"


def memory(num_ranks: int) -> list[Finding]:
    """Look at what is free for so many ranks on this node. Imports torch."""
    on_cpu = device_type() == "cpu"
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return [_ram(num_ranks), _finding(Level.FAIL, f"there is no {folder}, where ranks of a node meet", _GIVE_MORE)]
    return [_ram(num_ranks), shared_memory(shutil.disk_usage(folder).free, num_ranks=num_ranks, on_cpu=on_cpu)]


def shared_memory(free_bytes: int, *, num_ranks: int, on_cpu: bool) -> Finding:
    """Compare free shared memory with what the ranks of a node put there: on the CPU DeepSpeed, on GPUs NCCL."""
    needed_bytes = num_ranks * SHARED_BYTES_PER_RANK if on_cpu else SHARED_BYTES_OF_NCCL
    measured = f"{free_bytes / 1e6:.0f} MB free in /dev/shm"
    if free_bytes >= needed_bytes:
        return Finding(Level.OK, Subject.MEMORY, "shared memory", measured=measured)
    if not on_cpu:
        said = f"little shared memory: NCCL may want {needed_bytes / 1e6:.0f} MB"
        return Finding(Level.WARN, Subject.MEMORY, said, _GIVE_MORE, measured)
    said = f"too little shared memory: {num_ranks} ranks of DeepSpeed on the CPU need {needed_bytes / 1e6:.0f} MB"
    remedy = f"{_GIVE_MORE}; remove /dev/shm/deepspeed_allreduce_buffer_* of runs that are over"
    return Finding(Level.FAIL, Subject.MEMORY, said, remedy, measured)


def _ram(num_ranks: int) -> Finding:
    found = psutil.virtual_memory()
    measured = f"{found.available / 1e9:.1f} of {found.total / 1e9:.1f} GB free"
    if found.available >= num_ranks * _BYTES_PER_RANK:
        return Finding(Level.OK, Subject.MEMORY, "RAM", measured=measured)
    said = f"little RAM: {num_ranks} ranks take {num_ranks * _BYTES_PER_RANK / 1e9:.0f} GB before they have a model"
    return Finding(Level.WARN, Subject.MEMORY, said, "end other processes, or ask for more (#SBATCH --mem)", measured)


def _finding(level: Level, said: str, remedy: str) -> Finding:
    return Finding(level, Subject.MEMORY, said, remedy)
