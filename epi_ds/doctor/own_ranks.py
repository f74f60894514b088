"""Ranks that the doctor starts on this machine, where nobody has started it as one."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from epi_ds.doctor.accelerator import device_type
from epi_ds.doctor.finding import CheckFailedError, Finding, Level, Subject, from_json
from epi_ds.launch.local import device_ids, free_port, launch_command, remove_buffers, start_child

# Each rank, and the launcher, imports torch and DeepSpeed first.
_START_SECONDS = 120.0
# By its name: it makes the checks, one of which starts it.
_RANK = "epi_ds.doctor.own_rank"
_REMEDY = "epi-ds train starts its ranks in the same way: see to this error first"


def num_own_ranks() -> int:
    """Return how many ranks are started here: one for each device, or two on the CPU. Imports torch."""
    import torch

    return 2 if device_type() == "cpu" else max(2, torch.accelerator.device_count())


def own_ranks(folder: Path, *, seconds: float) -> list[Finding]:
    """Return what ranks of this machine find together.

    seconds  that they wait for each other

    Raises CheckFailedError where they do not start, or do not end.
    """
    import torch

    ranks, port = num_own_ranks(), free_port()
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if ranks > torch.accelerator.device_count():
        # No two ranks share a device: these talk as ranks on the CPU do.
        environment["DS_ACCELERATOR"], devices = "cpu", list[int | str](range(ranks))
    else:
        devices = device_ids(ranks)
    with tempfile.TemporaryDirectory(prefix="epi_ds_doctor_") as own:
        written = Path(own) / "findings.json"
        arguments = [str(written), str(folder.absolute()), str(seconds)]
        command = launch_command(_RANK, arguments, devices=devices, port=port)
        try:
            said = _run(command, environment, seconds=_START_SECONDS + 3 * seconds)
        finally:
            remove_buffers(port)
        if not written.exists():
            raise _failed(f"{ranks} ranks did not start: {said}")
        return from_json(written.read_text())


def _run(command: list[str], environment: dict[str, str], *, seconds: float) -> str:
    """Run the launcher to its end and return the last line that it or a rank said."""
    process = start_child(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise _failed(f"the ranks did not end in {seconds:.0f} s") from None
    finally:
        # Takes its ranks with it.
        process.terminate()
        process.wait()
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"


def _failed(said: str) -> CheckFailedError:
    return CheckFailedError(Finding(Level.FAIL, Subject.RANKS, said, _REMEDY))
