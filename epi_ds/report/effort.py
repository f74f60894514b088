"""What a run took: seconds by what they went into, and memory."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from epi_ds.report.run import Run

_LOOKS = {"steps": 7, "refreshes": 2, "evaluations": 3, "saves": 4, "own rows": 5}


class Part(NamedTuple):
    """Something that time went into."""

    name: str
    seconds: float
    share: float
    """Of all that is known."""
    look: int
    """Its colour, the same for every run, and none of the first runs'."""


class Effort(NamedTuple):
    """Time and memory of a run, of its first rank."""

    step_seconds: float | None
    """Median over the logged steps."""
    parts: tuple[Part, ...]
    """Empty where no time is known."""
    is_estimate: bool
    """Whether not every step was logged, so that those between are taken to be like them."""
    isolation_bytes: int | None
    peak_bytes: dict[str, int]
    """``host``, and ``device`` where there is one; empty where that is not known."""

    @property
    def seconds(self) -> float:
        """All that is known."""
        return sum(part.seconds for part in self.parts)


def effort_of(run: Run) -> Effort:
    """Return what a run took, as far as its metrics say; loading, and what a stop threw away, are not among it."""
    known = [step.seconds for step in run.steps if step.seconds is not None]
    steps = sum(known) / len(known) * run.last_step if known else 0.0
    refreshes = sum(one.seconds or 0.0 for one in run.refreshes)
    # Those before the first step and between stages are in no step.
    between = {0, *(stop for _, stop in run.stages.values())}
    inside = sum(one.seconds or 0.0 for one in run.refreshes if one.step not in between)
    own_rows = 0.0 if run.own_rows is None else run.own_rows.get("seconds") or 0.0
    found = {
        "steps": max(0.0, steps - inside),
        "refreshes": refreshes,
        "evaluations": sum(run.evaluation_seconds),
        "saves": sum(save.seconds for save in run.saves),
        "own rows": own_rows,
    }
    total = sum(found.values())
    summary = run.summary or {}
    return Effort(
        step_seconds=median(known) if known else None,
        parts=tuple(Part(name, value, value / total, _LOOKS[name]) for name, value in found.items() if value),
        is_estimate=len(known) < run.last_step,
        isolation_bytes=summary.get("memory_bytes"),
        peak_bytes=dict(summary.get("peak_bytes", {})),
    )
