"""Work that one process of a node does while the others of the node look at a file: nobody waits in a collective.

A collective would end by its time-out where the work takes long, and would not end before it where the worker died.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from epi_ds.checkpoint.disk import writing
from epi_ds.errors import LostRankError, RemedyError, UserError

_BEAT_SECONDS, _SILENCE_SECONDS, _LOOK_SECONDS = 1.0, 30.0, 0.1
_OLD_SECONDS = 3 * 24 * 3600.0


def once_per_node(attempt: Path, work: Callable[[], Any], *, is_worker: bool) -> Any:
    """Return what ``work`` returned on the worker of this node, which is a JSON value.

    attempt    a folder all processes of the node see, and no earlier start has used
    is_worker  whether this process does the work

    Raises what the work raised, if that was a UserError or a RemedyError, on all of them, and LostRankError where the
    worker is silent for half a minute: it died, or its machine stands still, or its disk is full.
    """
    place = attempt / socket.gethostname()
    if not is_worker:
        return _wait(place)
    _forget_old(attempt.parent)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    try:
        with _beating(place / "alive"):
            result = work()
        with writing(place):
            _write(place / "done", result)
    except Exception as error:
        # Where the disk is full the others hear of it by this one's silence.
        with suppress(OSError):
            _write(place / "failed", as_json(error))
        raise
    return result


def as_json(error: Exception) -> dict[str, str]:
    """Return an error for another process."""
    return {"kind": type(error).__name__, "message": str(error)}


def error_of(values: dict[str, str]) -> Exception:
    """Return the error that `as_json` wrote down: a UserError, or for all others a RemedyError."""
    return (UserError if values["kind"] == UserError.__name__ else RemedyError)(values["message"])


@contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Keep writing to a file while the body runs, so that others can tell a long work from a dead worker."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while True:
            with suppress(OSError):
                # A full disk is told of by the work, which needs more of it.
                _write(path, count)
            count += 1
            if ended.wait(_BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Listener:
    """Tells by a file that somebody keeps writing whether they are silent; clocks of two machines are not compared."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: str | None = None
        self._heard = time.monotonic()

    def is_silent(self) -> bool:
        """Whether nothing was written for half a minute."""
        now = self._path.read_text() if self._path.exists() else None
        if now != self._last:
            self._last, self._heard = now, time.monotonic()
        return time.monotonic() - self._heard > _SILENCE_SECONDS


def _wait(place: Path) -> Any:
    listener = _Listener(place / "alive")
    while True:
        if (done := place / "done").exists():
            return json.loads(done.read_text())
        if (failed := place / "failed").exists():
            # What is no user's mistake is told with its traceback by the process where it happened.
            raise error_of(json.loads(failed.read_text()))
        if listener.is_silent():
            raise LostRankError(
                f"the process that prepares the data on {place.name} has been silent for {_SILENCE_SECONDS:.0f} s; it "
                "died, or its disk stands still. If it left no message of its own, look for the kernel's out-of-memory "
                "killer (dmesg)"
            )
        time.sleep(_LOOK_SECONDS)


def _forget_old(folder: Path) -> None:
    """Remove what starts of days ago left: nobody looks at it any more."""
    for old in folder.glob("*") if folder.is_dir() else ():
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _OLD_SECONDS:
                shutil.rmtree(old)


def _write(path: Path, value: Any) -> None:
    begun = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    begun.write_text(json.dumps(value))
    begun.replace(path)
