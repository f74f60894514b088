"""DeepSpeed's operators: built, or to be compiled by the first start, which a killed one leaves locked."""

from __future__ import annotations

import os
from pathlib import Path

from epi_ds.doctor.finding import Finding, Level, Subject
from epi_ds.launch import operators as launch_operators
from epi_ds.launch.environment import accelerator_name

_BUILD = "epi-ds build-operators"


def operators() -> list[Finding]:
    """Say which operators of this machine's accelerator are built, without building them. Imports DeepSpeed."""
    names = _names()
    left = unbuilt()
    found = [
        _finding(Level.WARN, f"{', '.join(left)} not built in {folder()}: the first start compiles them", _BUILD)
        if left
        else _finding(Level.OK, f"{', '.join(map(_short, names)) or 'none is needed'}: built")
    ]
    return [*found, _nvme()]


def unbuilt() -> list[str]:
    """Return the operators that the first start of a run would have to compile. Imports DeepSpeed."""
    return [_short(name) for name in _names() if not _is_built(name)]


def locks() -> list[Finding]:
    """Find build locks that belong to no process of this machine: torch waits for them forever."""
    left = launch_operators.stale_locks(folder())
    if not left:
        return [Finding(Level.OK, Subject.LOCKS, "no build lock was left behind")]
    files = ", ".join(map(str, left))
    said = f"{files}: left by a build that was killed; every start waits for it forever"
    return [Finding(Level.FAIL, Subject.LOCKS, said, f"{_BUILD} removes it, unless another node is building right now")]


def folder() -> Path:
    """Return where torch keeps what it has built."""
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def _names() -> tuple[str, ...]:
    """Return the builders that `epi-ds build-operators` loads, but for that of NVMe."""
    from torch.utils.cpp_extension import CUDA_HOME

    kind = accelerator_name()
    if kind == "cuda" and CUDA_HOME is None:
        return ()
    return launch_operators.BUILDERS.get(kind, ())


def _is_built(name: str) -> bool:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    operator = get_accelerator().create_op_builder(name).name
    # Built with DeepSpeed itself (DS_BUILD_OPS=1), or by torch on demand.
    return bool(installed_ops.get(operator)) or (folder() / operator / f"{operator}.so").exists()


def _nvme() -> Finding:
    from deepspeed.accelerator import get_accelerator

    name = "AsyncIOBuilder"
    if get_accelerator().create_op_builder(name) is None:
        return _finding(Level.OK, "AsyncIO: not for this accelerator")
    if _is_built(name):
        return _finding(Level.OK, "AsyncIO, which NVMe offload needs: built")
    reasons: list[str] = []
    launch_operators.nvme_builders(reasons.append)
    said = "AsyncIO is not built, so there is no NVMe offload"
    library = "install libaio (Debian, Ubuntu: apt-get install libaio-dev), then " if reasons else ""
    return _finding(Level.WARN, said, f"if you want it: {library}{_BUILD}")


def _short(name: str) -> str:
    return name.removesuffix("Builder")


def _finding(level: Level, said: str, remedy: str = "") -> Finding:
    return Finding(level, Subject.OPERATORS, said, remedy)
