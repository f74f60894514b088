"""What a person watching sees: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds between two lines where there is no terminal.
_LINE_SECONDS = 5.0


class ProgressDisplay:
    """Shows the steps of a run. Silent on all ranks but the one that is given a console."""

    def __init__(self, console: Console | None, *, total_steps: int, first_step: int = 0) -> None:
        self._console = console
        self._total = total_steps
        self._last_line = 0.0
        self._progress: Progress | None = None
        if console is not None and console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, status="")
            self._progress.start()

    def step(self, step: int, *, stage: str, loss: float, isolated_share: float) -> None:
        """Show a finished step."""
        status = f"loss {loss:.3f}  isolated {isolated_share:.2%}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=stage, status=status)
        else:
            self._line(f"step {step}/{self._total}  {stage}  {status}", is_last=step == self._total)

    def evaluation(self, task: str, *, done: int, total: int, seconds: float) -> None:
        """Show how many rows of a task are scored, and after how many seconds of the evaluation."""
        status = f"evaluating {task}: {done}/{total} rows, {seconds:.0f} s"
        if self._progress is not None:
            self._progress.update(self._task, status=status)
        else:
            self._line(status)

    def _line(self, text: str, *, is_last: bool = False) -> None:
        """Print a line where there is no bar, unless the one before is too near; the last one in any case."""
        if self._console is not None and (time.monotonic() - self._last_line > _LINE_SECONDS or is_last):
            self._last_line = time.monotonic()
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
