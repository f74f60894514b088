"""Which implementation of our own operations runs on this machine."""

from __future__ import annotations

import os

from epi_ds.doctor.accelerator import device_type
from epi_ds.doctor.finding import Finding, Level, Subject

_SPEED = "the same bits, several times as slowly"


def kernels() -> list[Finding]:
    """Find the backend of every type of device here; compiles the C++ where that has not been done. Imports torch."""
    # With offload, the partitions of a GPU are on the CPU.
    return [_backend(kind) for kind in dict.fromkeys([device_type(), "cpu"])]


def _backend(kind: str) -> Finding:
    from epi_ds.kernels.cpu.build import library
    from epi_ds.kernels.dispatch import VARIABLE, Backend, backend_on, reason_against

    if os.environ.get(VARIABLE, "auto") != "auto":
        # Raises where it cannot be had, as training would.
        chosen = backend_on(kind)
        said = f"{kind}: {chosen.value}, as {VARIABLE} asks for"
        if chosen is Backend.REFERENCE:
            return Finding(Level.WARN, Subject.KERNELS, f"{said}: {_SPEED}", f"unset {VARIABLE}")
        return Finding(Level.OK, Subject.KERNELS, said)
    if (reason := reason_against(kind)) is not None:
        first_line = reason.partition("\n")[0]
        said = f"{kind}: plain torch, {_SPEED}: {first_line}"
        return Finding(Level.WARN, Subject.KERNELS, said, "install what is missing; nothing else depends on it")
    if kind == "cuda":
        return Finding(Level.OK, Subject.KERNELS, "cuda: Triton")
    # Nodes with other processors get the same bits.
    return Finding(Level.OK, Subject.KERNELS, "cpu: C++", measured=library().epi_isa().decode())
