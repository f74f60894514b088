"""Run real commands, as a user does, and end what they leave behind when they take too long."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil


class Finished(NamedTuple):
    """The end of a command."""

    exit_code: int
    output: str
    """Standard output and standard error, as they came."""


def run_command(command: Sequence[str], *, timeout: float = 300.0, cwd: Path | None = None) -> Finished:
    """Run a command to its end. On a time-out its own process tree, and nothing else, is ended."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Taken before anything is ended: a child whose parent is gone is no longer found from here.
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in tree:
            member.kill()
        output, _ = process.communicate()
        raise TimeoutError(f"{command} did not end in {timeout} s; its output:\n{output[-8000:]}") from None
    return Finished(process.returncode, output)


def run_epi_ds(*arguments: str, timeout: float = 300.0) -> Finished:
    """Run the installed ``epi-ds`` command."""
    return run_command([str(Path(sys.prefix) / "bin" / "epi-ds"), *arguments], timeout=timeout)


def checked(finished: Finished, exit_code: int = 0) -> str:
    """Return the output of a command that ended as expected; fail showing it otherwise."""
    assert finished.exit_code == exit_code, (
        f"exit code {finished.exit_code}, not {exit_code}:\n{finished.output[-8000:]}"
    )
    return finished.output
