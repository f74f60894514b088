"""How long our overrides take in a step, apart from the work of DeepSpeed's that they call.

[Note: clock] Every overridden method is entered and left under the clock, and so is what it calls by ``super()``: the
classes that do this stand around the mixin in the order of method resolution. Time runs for the innermost of them, so
what ZeRO-3 does within an override is not ours, and what an override does within ZeRO-3's step is.
"""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from epi_ds.zero3.mixin import IsolationMixin

# The owner of the time that is spent in our overrides; all others are names of ZeRO-3's methods.
OURS = "ours"


class StepClock:
    """Seconds since the last `take`, by whose they are: ours, or a method of ZeRO-3's by its name."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._owners: list[str] = []
        self._since = 0.0

    def take(self) -> dict[str, float]:
        """Return the seconds by owner, and begin anew."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken

    def timed(self, function: Callable[..., Any], owner: str) -> Callable[..., Any]:
        """Return ``function``, whose time is its owner's."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._owners.append(owner)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._owners.pop()

        return run

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._owners:
            self._seconds[self._owners[-1]] += now - self._since
        self._since = now


class TimedClasses:
    """The classes of an isolated ZeRO-3 optimizer under a clock, with isolation and without. See [Note: clock]."""

    def __init__(self, optimizer: Any) -> None:
        """``optimizer`` is untouched; its class is to be set to one of these, and back to `untimed` in the end."""
        self.untimed: type = type(optimizer)
        zero3 = self.untimed.__bases__[1]
        self.clock = StepClock()
        overrides = {
            name: method
            for name, method in vars(IsolationMixin).items()
            if inspect.isfunction(method) and hasattr(zero3, name)
        }
        theirs = {name: self.clock.timed(getattr(zero3, name), name) for name in overrides}
        ours = {name: self.clock.timed(method, OURS) for name, method in overrides.items()}
        self.plain = type("TimedZero3", (zero3,), theirs)
        self.isolating = type("TimedIsolation", (IsolationMixin, self.plain), ours)
