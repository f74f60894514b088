"""The devices that torch sees."""

from __future__ import annotations

import os

from epi_ds.doctor.finding import Finding, Level, Subject


def device_type() -> str:
    """Return the type of device that training uses, without importing DeepSpeed, which may be broken. Imports torch."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None or os.environ.get("DS_ACCELERATOR") == "cpu" else found.type


def accelerator() -> list[Finding]:
    """Say which devices there are and, of NVIDIA's, whether they can do what recipes ask for. Imports torch."""
    import torch

    if not torch.accelerator.is_available():
        remedy = f"where there is one, nvidia-smi must list it, and torch be built for it (this is {torch.__version__})"
        return [_finding(Level.WARN, "none, so training runs on the CPU", remedy)]
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        said = f"{count} of type {kind} are not used: DS_ACCELERATOR=cpu"
        return [_finding(Level.WARN, said, "unset DS_ACCELERATOR")]
    if not torch.cuda.is_available():
        return [_finding(Level.OK, f"{count} of type {kind}")]
    return [_finding(Level.OK, _devices(count)), *_bf16(), *_nccl()]


def _devices(count: int) -> str:
    """Return the devices by kind, such as ``8 x NVIDIA H100 of 80 GB``."""
    import torch

    kinds: dict[str, int] = {}
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        kind = f"{properties.name} of {properties.total_memory / 1e9:.0f} GB"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{number} x {kind}" for kind, number in kinds.items())


def _bf16() -> list[Finding]:
    import torch

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return []
    remedy = "in a recipe, train.bf16: false and train.fp16: true"
    return [_finding(Level.WARN, "no bf16 on this kind of device", remedy)]


def _nccl() -> list[Finding]:
    import torch.distributed as dist

    if dist.is_nccl_available():
        return []
    return [_finding(Level.FAIL, "torch is built without NCCL", "install a build of torch from pytorch.org for Linux")]


def _finding(level: Level, said: str, remedy: str = "") -> Finding:
    return Finding(level, Subject.ACCELERATOR, said, remedy)
