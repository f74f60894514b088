"""Compile the C++ operations on first use, into a cache that no killed process can spoil.

[Note: cache] The library lies in a folder named by a digest of all that it is made from: sources, compiler, flags and
architecture. It is linked under a name of its own and then renamed, so it is whole or absent; there is no lock to be
left behind. Ranks that start at once on a cold cache each compile, and the last to finish replaces what is the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from epi_ds.launch.environment import cache_folder

_FOLDER = Path(__file__).parent
_OPERATIONS = (
    "code_histogram",
    "decode",
    "encode",
    "hold",
    "masked_sumsq",
    "observe",
    "pull",
    "pull_by_code",
    "select",
    "sketch_counts",
)
# One rounding per operation, whatever the instruction set: nothing may be contracted to a fused multiply-add.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # gcc warns of its own headers.
    "-w",
)
_AVX2 = ("-mavx2", "-mpopcnt")
_VARIANTS = {
    "portable": (),
    "avx2": _AVX2,
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}


def variants() -> tuple[str, ...]:
    """Return the instruction sets that every operation is compiled for on this architecture."""
    return tuple(_VARIANTS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled operations; compile them where they are not in the cache. See [Note: cache].

    Raises RuntimeError where there is no compiler, or it fails, or the cache cannot be written to.
    """
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (g++, c++, clang++, or CXX)")
    target = cache_folder() / "kernels" / _digest(compiler) / "libepi_ds.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, target)
        found = ctypes.CDLL(str(target))
    except OSError as error:
        raise RuntimeError(
            f"{target} cannot be written or loaded: {error}; set EPI_DS_CACHE to another folder"
        ) from error
    found.epi_isa.restype = ctypes.c_char_p
    return found


def _digest(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(_FOLDER.glob("*.cpp")) + sorted(_FOLDER.glob("*.h")):
        digest.update(source.name.encode() + source.read_bytes())
    version = _run([compiler, "--version"])
    digest.update(repr((version, platform.machine(), _FLAGS, _VARIANTS)).encode())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not start: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = {f"{folder}/isa.o": ("isa.cpp", ())} | {
            f"{folder}/{source}.{variant}.o": (f"{source}.cpp", (*_VARIANTS[variant], f"-DEPI_VARIANT={variant}"))
            # Variant by variant: of a function that several have, such as the standard library's, the linker takes the
            # first, which every processor can run.
            for variant in variants()
            for source in _OPERATIONS
        }
        commands = [
            [compiler, *_FLAGS, *flags, "-c", str(_FOLDER / source), "-o", made]
            for made, (source, flags) in objects.items()
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = f"{folder}/{target.name}"
        _run([compiler, "-shared", "-fopenmp", *objects, "-o", linked])
        os.replace(linked, target)
