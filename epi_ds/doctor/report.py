"""Findings as they come: a check that fails, or never comes back, hides none of the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from epi_ds.doctor.finding import Check, CheckFailedError, Finding, Level, Subject, in_order
from epi_ds.launch.lost_ranks import lost_rank

T = TypeVar("T")

LIMIT_SECONDS = 180.0
"""What a check of one node may take. The slowest compiles the kernels, or imports from a cold network disk."""


class Report:
    """The findings of this process."""

    def __init__(self, tell: Callable[[list[Finding]], None], *, exit_code: int = 1) -> None:
        """``exit_code`` is that of a process that has to end without an answer.

        tell  shows findings to the user, and flushes what it writes to
        """
        self.findings: list[Finding] = []
        self._tell = tell
        self._exit_code = exit_code

    def attempt(
        self, subject: Subject, action: Callable[[], T], *, seconds: float = LIMIT_SECONDS, late: Finding | None = None
    ) -> T | None:
        """Return what an action returns, or None where it fails: that is a finding then.

        seconds  after which all that was found so far is told and the process ends: nothing interrupts a library that
                 waits for another machine, or a read of a disk that is gone
        late     what is found then
        """
        said = f"no answer within {seconds:.0f} s; what comes after it was not looked at"
        timer = threading.Timer(seconds, self._give_up, (late or Finding(Level.FAIL, subject, said),))
        timer.daemon = True
        timer.start()
        try:
            return action()
        except CheckFailedError as error:
            self.findings.append(error.finding)
        except Exception as error:  # whatever a broken installation raises: it is what is looked for
            self.findings.append(_crashed(subject, error))
        finally:
            timer.cancel()
        return None

    def run(self, check: Check, *, seconds: float = LIMIT_SECONDS) -> bool:
        """Add what a check finds, and return whether it could be made. See `attempt`."""
        found = self.attempt(check.subject, check.run, seconds=seconds)
        self.findings += found or []
        return found is not None

    def run_all(self, checks: Sequence[Check]) -> None:
        """Run checks that do without each other."""
        for check in checks:
            self.run(check)

    def tell(self) -> None:
        """Show the findings."""
        self._tell(in_order(self.findings))

    def end(self) -> NoReturn:
        """End the process at once, whatever its threads wait for."""
        os._exit(self._exit_code)

    def _give_up(self, late: Finding) -> None:
        self.findings.append(late)
        self.tell()
        self.end()


def _crashed(subject: Subject, error: Exception) -> Finding:
    if reason := lost_rank(error):
        remedy = "see what that rank printed, and look for the kernel's out-of-memory killer (dmesg)"
        return Finding(Level.FAIL, subject, reason.partition(". ")[0], remedy)
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return Finding(Level.FAIL, subject, said, "the check could not be made: see to this error first")
