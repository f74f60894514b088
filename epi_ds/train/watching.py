"""Follow a run by its metrics file, from another terminal or machine that sees its folder (``epi-ds watch``)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from epi_ds.train.metrics import evaluation_told
from epi_ds.train.progress import ProgressDisplay
from epi_ds.train.settings import END

_POLL_SECONDS = 0.5
# A run writes a line for every step that it logs; evaluations and saves take longer, and stay silent meanwhile.
_SILENT_SECONDS = 300.0


class GrowingFile:
    """The lines of a metrics file as they come, through the resumes that begin the file anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._position = 0
        self._begun = b""
        """A line that has not been written to its end."""
        self._returned: set[int] = set()
        """Of every line that was returned, its hash."""
        self._repeats = False
        """Whether the file holds lines that were returned before, of another file in its place."""

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines that are new since the last call, none where there is no file.

        A resumed run puts another file in its place, with the lines up to where it goes on, which are left out here.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if self._inode not in (None, status.st_ino) or status.st_size < self._position:
                self._position, self._begun, self._repeats = 0, b"", True
            self._inode = status.st_ino
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        *whole, self._begun = (self._begun + new).split(b"\n")
        return [json.loads(line) for line in whole if self._is_new(line)]

    def _is_new(self, line: bytes) -> bool:
        if self._repeats and hash(line) in self._returned:
            return False
        self._repeats = False
        self._returned.add(hash(line))
        return True


def watch(path: Path, console: Console, *, wait: Callable[[float], None] = time.sleep) -> None:
    """Show a run as it shows itself, until it has ended. Changes nothing.

    path  its metrics file, which may not be there yet
    wait  is called with seconds while there is nothing new
    """
    file, silent, told_of_silence = GrowingFile(path), 0.0, False
    with ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay(console, total_steps=0))
        if not path.exists():
            display.note(f"waiting for {path}")
        for line in _lines(file, wait):
            if line is None:
                silent += _POLL_SECONDS
                if silent >= _SILENT_SECONDS and not told_of_silence:
                    told_of_silence = True
                    display.note(f"nothing new for {silent:.0f} s: a long evaluation or save, or the run was stopped")
                continue
            silent, told_of_silence = 0.0, False
            if line["event"] == "run":
                display.close()
                total, first = line["total_steps"], line["step"]
                display = stack.enter_context(ProgressDisplay(console, total_steps=total, first_step=first))
            _show(line, display)
            if line["event"] == END:
                return


def _lines(file: GrowingFile, wait: Callable[[float], None]) -> Iterator[dict[str, Any] | None]:
    """Yield lines as they come, and None after every wait for one."""
    while True:
        yield from file.read()
        wait(_POLL_SECONDS)
        yield None


def _show(line: Mapping[str, Any], display: ProgressDisplay) -> None:
    match line["event"]:
        case "run":
            begun = f"goes on at step {line['step']}" if line["resumed"] else "begins"
            display.note(f"the run {begun}: {line['total_steps']} steps, {line['world_size']} ranks")
        case "step":
            # Null where it was not finite.
            loss = float("nan") if line["loss"] is None else line["loss"]
            share = line["isolated_share"]
            display.step(line["step"], stage=line["stage"], loss=loss, isolated_share=share)
        case "evaluation":
            display.note(evaluation_told(line))
        case "save":
            failed = "could not be saved" if line["failed"] else "saved"
            display.note(f"checkpoint of step {line['step']} {failed}, {line['seconds']:.1f} s")
        case event if event == END:
            display.note("the run has ended, and its model is exported")
