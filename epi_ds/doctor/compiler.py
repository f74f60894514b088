"""What DeepSpeed's operators and our kernels are compiled with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from epi_ds.doctor.accelerator import device_type
from epi_ds.doctor.finding import Finding, Level, Subject
from epi_ds.doctor.operators import unbuilt

# As kernels/cpu/build.py looks for them.
_COMPILERS = ("g++", "c++", "clang++")
_WITHOUT = "kernels that are not compiled yet run as plain torch, and operators that are not built yet cannot be"


def compiler() -> list[Finding]:
    """Say which compilers there are; where one is missing, whether DeepSpeed has to compile before it trains."""
    asked = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [asked] if asked else _COMPILERS)), None)
    if found is not None:
        first = Finding(Level.OK, Subject.COMPILER, f"{found}: {_version(found)}")
    else:
        said = f"CXX={asked} does not exist" if asked else f"no C++ compiler ({', '.join(_COMPILERS)})"
        first = _missing(said, "install one (Debian, Ubuntu: apt-get install g++), or set CXX to one")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    said, remedy = f"no headers of Python ({headers})", "Debian, Ubuntu: apt-get install python3-dev"
    return [first, *([] if headers.exists() else [_missing(said, remedy)]), *_nvcc()]


def _missing(said: str, remedy: str) -> Finding:
    if device_type() == "cpu" and (left := unbuilt()):
        # On the CPU every start loads them.
        said, level = f"{said}, and DeepSpeed needs {', '.join(left)}", Level.FAIL
    else:
        said, level = f"{said}: {_WITHOUT}", Level.WARN
    return Finding(level, Subject.COMPILER, said, remedy)


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", check=True)
    return done.stdout.partition("\n")[0]


def _nvcc() -> list[Finding]:
    if device_type() != "cuda":
        return []
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is not None:
        return [Finding(Level.OK, Subject.COMPILER, f"CUDA toolkit in {CUDA_HOME}")]
    return [
        Finding(
            Level.WARN,
            Subject.COMPILER,
            "no CUDA toolkit (nvcc), so DeepSpeed's FusedAdam and CPUAdam cannot be built: the shipped zero3 "
            "configuration does without them, zero3_offload does not",
            "module load cuda, or set CUDA_HOME, of the release that torch was built for",
        )
    ]
