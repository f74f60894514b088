"""Being told to end: the signals by which a process hears that its time is over, and the exit code that says so.

Slurm sends SIGUSR1 where ``--signal`` asks for it, and SIGTERM before it preempts, requeues or cancels a job: often
twice, and each time with a SIGCONT. The deepspeed launcher, torchrun and mpirun send SIGTERM. Either would end a rank,
and with it all others, at once; a rank that listens goes on, and asks `received` when it can stop. See
epi_ds/preemption.py.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = 85
"""Of a run that saved, and ended because it was told to: the same command goes on. Slurm's manual uses this number for
``RequeueExit``."""

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# Handlers belong to the whole process, and so does what they have heard.
_received: list[signal.Signals] = []
_previous: dict[signal.Signals, Any] = {}


def listen() -> bool:
    """From here on SIGUSR1 and SIGTERM are noted instead of ending this process. Handlers of others are called too.

    Returns whether this call began it: who did is to call `stop_listening`.
    """
    if _previous:
        return False
    if threading.current_thread() is not threading.main_thread():
        # Python lets nobody else set handlers.
        logger.warning("not in the main thread: SIGTERM and SIGUSR1 end this process without a checkpoint")
        return False
    for number in _SIGNALS:
        _previous[number] = signal.signal(number, _note)
    return True


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
    if callable(previous := _previous.get(signal.Signals(number))):
        previous(number, frame)


def received() -> signal.Signals | None:
    """Return the first signal that came since `listen`, None where none did."""
    return _received[0] if _received else None


def stop_listening() -> None:
    """Put back what was there before `listen`, and forget what came."""
    _received.clear()
    while _previous:
        number, handler = _previous.popitem()
        # None where the handler was not set from Python, which cannot put it back.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def ending_when_told() -> Iterator[None]:
    """End the block by SystemExit with `REQUEUE_EXIT_CODE` upon SIGUSR1 or SIGTERM, so that it can end what it started.

    For a command that has nothing of its own to save. Further signals are ignored: it is ending already.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        be_deaf()
        raise SystemExit(REQUEUE_EXIT_CODE)

    previous = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def be_deaf() -> None:
    """Ignore the signals from here on, also while Python ends, which puts the default back in place of a handler.

    For a process that ends by itself: the first rank to end makes srun and launchers send SIGTERM to the others.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
