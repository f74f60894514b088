"""How long our overrides take in a step, apart from the work of DeepSpeed's that they call.

[Note: clock] Every overridden method is entered and left under the clock, and so is what it calls by ``super()``: the
classes that do this stand around the mixin in the order of method resolution. Time runs for the innermost of them, so
what ZeRO-3 does within an override is not ours, and what an override does within ZeRO-3's step is. Ranks are aligned
before the norm, which is where they wait for the slowest one in any case: how far they are apart is chance, and of one
millisecond or ten.
"""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from epi_ds.zero3.mixin import IsolationMixin

# The first collective after backward.
_FIRST_COLLECTIVE = "_get_norm_groups"


class Owner(NamedTuple):
    """Whose time it is."""

    is_ours: bool
    """An override's, without what it calls of ZeRO-3; otherwise a method's of ZeRO-3 itself."""
    method: str


class StepClock:
    """Seconds since the last `take`, by whose they are."""

    def __init__(self) -> None:
        self._seconds: dict[Owner, float] = defaultdict(float)
        self._owners: list[Owner] = []
        self._since = 0.0

    def take(self) -> dict[Owner, float]:
        """Return the seconds by owner, and begin anew."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken

    def timed(self, function: Callable[..., Any], owner: Owner) -> Callable[..., Any]:
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
        theirs = {name: self.clock.timed(getattr(zero3, name), Owner(False, name)) for name in overrides}
        ours = {name: self.clock.timed(method, Owner(True, name)) for name, method in overrides.items()}
        for methods in (theirs, ours):
            methods[_FIRST_COLLECTIVE] = self._aligned(methods[_FIRST_COLLECTIVE])
        self.plain = type("TimedZero3", (zero3,), theirs)
        self.isolating = type("TimedIsolation", (IsolationMixin, self.plain), ours)

    def _aligned(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` after a wait for all ranks, which is nobody's time."""
        wait = self.clock.timed(dist.barrier, Owner(False, "barrier"))

        def run(*args: Any, **kwargs: Any) -> Any:
            wait()
            return function(*args, **kwargs)

        return run
