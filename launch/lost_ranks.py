"""Ranks that die or stand still, and those they leave behind: all of them end, and say why."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

import psutil

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LAUNCHER = "deepspeed.launcher.launch"
# What gloo and NCCL say; they have no types for it.
_DEATHS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited or there was a network error",
)
_TIMEOUTS = ("Timed out waiting", "Timed out after", "collective operation timeout")

_ENDING = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
OF_A_DEATH = "Its own message says why; if it left none, look for the kernel's out-of-memory killer (dmesg)"


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends. Nothing but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def die_with_launcher() -> None:
    """End this rank when DeepSpeed's node launcher is killed, which leaves its ranks to themselves.

    By SIGKILL, which reaches a stopped process too. Other starters see to their ranks themselves, and may start them
    from a thread, whose end would pass for the parent's.
    """
    with suppress(psutil.Error):
        if _LAUNCHER in psutil.Process(os.getppid()).cmdline():
            die_with_parent(signal.SIGKILL)


def lost_rank(error: BaseException) -> str | None:
    """Return what an error of a collective says of another rank, with what to look at; None where it says nothing."""
    said = str(error)
    # First, because NCCL's errors of a death mention its time-outs too.
    for sign in _DEATHS:
        if sign in said:
            return f"another rank has ended ({_from(said, sign)}). {OF_A_DEATH}"
    for sign in _TIMEOUTS:
        if sign in said:
            return (
                f"another rank was stopped or hangs ({_from(said, sign)}). train.ddp_timeout is how many seconds "
                "ranks wait for each other"
            )
    return None


def _from(said: str, sign: str) -> str:
    """Return an error's text from a sign to the end of its sentence."""
    return said[said.index(sign) :].splitlines()[0].split(". ")[0]


def signal_of(exit_code: int) -> signal.Signals | None:
    """Return the signal that ended DeepSpeed's launcher, or a rank of it: the exit code is then 256 - the number."""
    number = -exit_code % 256
    # 255 and 254 are what programs like to end with by themselves.
    return signal.Signals(number) if number in _ENDING else None
