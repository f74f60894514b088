"""Compile every kernel ahead of time, and read what it needs of a processor: ``python -m epi_ds.kernels.gpu.aot``.

No GPU is needed: the assembler and the reader of its output come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from epi_ds.kernels.gpu import decode, encode, hold, masked_sumsq, observe, pull, pull_by_code, select, sketch_counts
from epi_ds.kernels.gpu.launch import OPTIONS, Specialisation

ARCHITECTURES = (80, 90)
"""A100 and H100."""

_OPERATIONS = (observe, decode, encode, sketch_counts, masked_sumsq, select, hold, pull, pull_by_code)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Resources(NamedTuple):
    """What one thread, and one program, of a compiled kernel needs."""

    kernel: str
    specialisation: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    """Of these, sm_90 keeps 1024 to itself."""


def specialisations() -> Iterator[Specialisation]:
    """Yield everything that may be launched. See [Note: specialisations] in launch.py."""
    for operation in _OPERATIONS:
        yield from operation.specialisations()


def signature_of(specialisation: Specialisation) -> dict[str, str]:
    """Return the type of every parameter, as Triton spells it."""
    signature = {}
    for parameter in specialisation.kernel.params:
        if parameter.name in specialisation.constants:
            signature[parameter.name] = "constexpr"
        elif parameter.name in specialisation.pointers:
            signature[parameter.name] = "*" + specialisation.pointers[parameter.name]
        else:
            signature[parameter.name] = parameter.annotation_type
    return signature


def compiled(specialisation: Specialisation, arch: int) -> Any:
    """Return a kernel that is compiled as a launch would, for NVIDIA's ``sm_<arch>``. Cached by Triton."""
    source = ASTSource(specialisation.kernel, signature_of(specialisation), constexprs=specialisation.constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS)


def resources(specialisation: Specialisation, arch: int) -> Resources:
    """Compile a kernel and return what it needs. Raises ValueError where that cannot be read."""
    program = compiled(specialisation, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Spilled registers live in local memory, or on the stack, which is a part of it.
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL", "SHARED"}:
        raise ValueError(f"{' '.join(command)} names no registers, stack, local and shared memory:\n{text}")
    # What a launch asks for is not written in the cubin, but comes on top of what is.
    shared_bytes = usage["SHARED"] + program.metadata.shared
    name = specialisation.kernel.__name__.lstrip("_")
    operation = specialisation.kernel.__module__.rpartition(".")[2]
    spill_bytes = usage["STACK"] + usage["LOCAL"]
    return Resources(f"{operation}.{name}", specialisation.name, arch, usage["REG"], spill_bytes, shared_bytes)


def table() -> list[Resources]:
    """Return what every kernel needs on every architecture."""
    asked = [(specialisation, arch) for specialisation in specialisations() for arch in ARCHITECTURES]
    return [resources(*each) for each in asked]


def main() -> None:
    """Print the table."""
    print(f"{'kernel':<28}{'specialisation':<24}{'arch':>6}{'registers':>11}{'spilled B':>11}{'shared B':>10}")
    for row in table():
        print(f"{row[0]:<28}{row[1]:<24}{'sm_' + str(row[2]):>6}{row[3]:>11}{row[4]:>11}{row[5]:>10}")


if __name__ == "__main__":
    main()
