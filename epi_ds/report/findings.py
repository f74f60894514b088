"""What a reader of a run's figures should know first: what went wrong in it, and what makes them say less."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

from epi_ds.report.run import Run

# Below it most of the budget is unused, and most steps are plain fine-tuning.
_FEW = 0.5


class Level(StrEnum):
    """How bad it is."""

    WRONG = "wrong"
    WARNING = "warning"
    NOTE = "note"


class Finding(NamedTuple):
    """One thing to know."""

    level: Level
    said: str


def findings_of(run: Run) -> tuple[Finding, ...]:
    """Return what there is to know of a run, the worst first."""
    order = list(Level)
    found = (*_of_the_audit(run), *_of_numbers(run), *_of_saves(run), *_of_masks(run), *_of_its_course(run))
    return tuple(sorted(found, key=lambda finding: order.index(finding.level)))


def _of_the_audit(run: Run) -> Iterator[Finding]:
    if run.audit is not None and run.audit.is_sound is False:
        yield Finding(Level.WRONG, f"The audit: {run.audit.verdict}.")


def _of_numbers(run: Run) -> Iterator[Finding]:
    """What was not finite, and what was not trained for it."""
    skipped = 0 if run.summary is None else run.summary.get("skipped_steps", 0)
    if skipped:
        yield Finding(
            Level.WARNING,
            f"{skipped} of {run.total_steps} steps were skipped because gradients were not finite: the model learnt "
            "nothing in them. A few are loss scaling at work under fp16; many are a broken run.",
        )
    lost = sorted(run.lost, key=lambda one: (one.event, one.name, one.step))
    for (event, name), group in groupby(lost, key=lambda one: (one.event, one.name)):
        steps = [one.step for one in group]
        shown = ", ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")
        yield Finding(Level.WARNING, f"{name} was not a finite number at {event} {_plural(len(steps))}: step {shown}.")


def _of_saves(run: Run) -> Iterator[Finding]:
    for save in run.saves:
        if save.failed:
            yield Finding(Level.WRONG, f"The checkpoint of step {save.step} could not be saved; training went on.")


def _of_masks(run: Run) -> Iterator[Finding]:
    refreshes = [one for one in run.refreshes if one.budget]
    unused = [one.step for one in refreshes if one.isolated < _FEW * (one.budget or 0)]
    if unused:
        yield Finding(
            Level.WARNING,
            f"{len(unused)} of {len(refreshes)} refreshes isolated less than half of what was asked for, first after "
            f"step {unused[0]}: under the normalizer minmax a few very large entries can decide a whole layer's share. "
            "Try normalizer: mean.",
        )
    active = run.active_share
    if run.refreshes and active is not None and active < _FEW:
        yield Finding(Level.WARNING, f"A mask was in force in {active:.0%} of the steps only; lower refresh_interval.")


def _of_its_course(run: Run) -> Iterator[Finding]:
    if run.summary is None:
        yield Finding(
            Level.WARNING,
            f"The run has not ended: step {run.last_step} of {run.total_steps}. Started again, it goes on from its "
            "newest checkpoint.",
        )
    elif not run.is_exported:
        yield Finding(
            Level.WARNING,
            "All steps were trained, but the model was not exported to its end. Started again, the run does so.",
        )
    for start in run.starts:
        if not start.resumed:
            continue
        changed = "; ".join(f"{one['key']} was {one['before']}, is {one['now']}" for one in start.changed)
        yield Finding(
            Level.NOTE,
            f"It was stopped, and resumed after step {start.step} on {start.ranks} ranks"
            + (f", with other settings: {changed}." if changed else ", with the same settings."),
        )


def _plural(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
