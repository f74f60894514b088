"""Build DeepSpeed's operators once, before ranks need them.

DeepSpeed compiles an operator when a rank first uses it. A rank killed during that leaves torch's lock file behind,
and every later start then waits for it forever (https://github.com/pytorch/pytorch/issues/189245). Built here, under a
lock that the kernel releases with its process, a lock file that no running process keeps open belongs to nobody.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from epi_ds.errors import RemedyError
from epi_ds.launch.environment import accelerator_name, prepare_environment

# What ZeRO-3 with Adam uses, by accelerator. On a GPU the fused optimizer is all that is compiled.
# NVMe offload needs AsyncIO too, which is built where its library is.
BUILDERS = {
    "cpu": ("ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"),
    "cuda": ("FusedAdamBuilder", "CPUAdamBuilder"),
}


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".epi_ds_build").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stale_locks(folder: Path) -> list[Path]:
    """Return the build locks of torch in an extensions folder that no process of this machine keeps open."""
    held: set[str] = set()
    for process in psutil.process_iter():
        # Processes of other users, and those that end meanwhile.
        with suppress(psutil.Error):
            held.update(file.path for file in process.open_files())
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    return sorted(lock for lock in locks if str(lock.resolve()) not in held)


def nvme_builders(report: Callable[[str], None]) -> tuple[str, ...]:
    """Return the builder of what NVMe offload needs, where the headers of libaio are installed."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    # DeepSpeed's own test: it compiles a call of the library.
    if builder is None or not builder.is_compatible(verbose=False):
        report(
            "no libaio found, so DeepSpeed's AsyncIO, which NVMe offload needs, is not built (Debian, Ubuntu: apt-get "
            "install libaio-dev)"
        )
        return ()
    return ("AsyncIOBuilder",)


def build_operators(report: Callable[[str], None]) -> None:
    """Build (or find built) the operators of this machine's accelerator. ``report`` is given a line per operator.

    Raises RemedyError naming the operator and the remedy when one cannot be built.
    """
    prepare_environment()
    accelerator = accelerator_name()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    if accelerator == "cuda" and cpp_extension.CUDA_HOME is None:
        report(
            "no CUDA toolkit (nvcc) found, so DeepSpeed's FusedAdam and CPUAdam are not built. The shipped zero3 "
            "configuration does without them; zero3_offload needs them"
        )
        return
    with _exclusive(folder):
        for lock in stale_locks(folder):
            report(f"removing {lock}, left by a build that was killed")
            lock.unlink()
        for name in (*BUILDERS.get(accelerator, ()), *nvme_builders(report)):
            started = time.perf_counter()
            try:
                get_accelerator().create_op_builder(name).load()
            except Exception as error:  # DeepSpeed and torch raise many types here
                raise RemedyError(
                    f"DeepSpeed's {name.removesuffix('Builder')} could not be built in {folder}: {error}. It needs a "
                    "C++ compiler (Debian, Ubuntu: apt-get install g++ python3-dev)"
                ) from error
            report(f"{name.removesuffix('Builder')} ready after {time.perf_counter() - started:.0f} s")
