"""``epi-ds bench step``: what isolation adds to a step of plain ZeRO-3, on one engine whose class is switched.

[Note: overhead] The primary figure is (our time - the time of the work we replace) / a plain step. Our time is what the
overrides take, the work of ZeRO-3's that they call left out, and a hundredth of a refresh. What they replace are those
methods of ZeRO-3's that a plain step calls and an isolating one does not; each is measured where it runs, in turn, on
the same engine and the same data. The difference of whole steps would drown in the noise of forward and backward; it is
taken as a confirmation from many pairs of one plain and one isolating step.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

import epi_ds
from epi_ds.bench.engine import bench_engine, save_weights, tokens_of_a_step
from epi_ds.bench.ranks import run_on_ranks
from epi_ds.bench.step_clock import Owner, TimedClasses
from epi_ds.choices import AnchorDevice, AnchorWeight, Apply, Memory, Pull, StateFormat
from epi_ds.zero3.attach import detach

REFRESH_INTERVAL = 100
_RATIO = 0.01
_REFRESHES = 3
_RESAMPLES = 2000


class Case(NamedTuple):
    """One combination of settings."""

    state: StateFormat
    apply: Apply
    offload: bool
    pull: Pull | None = None
    """With an anchor beside isolation."""
    weight: AnchorWeight = AnchorWeight.UNIFORM
    device: AnchorDevice = AnchorDevice.PARTITION
    """Where the anchor is kept."""


# Of which whole steps are compared, too.
CONFIRMED = [(StateFormat.FP32, Apply.UPDATE), (StateFormat.U16, Apply.REDUCTION)]
# Of which an anchor pulls by importance: by code, and entry by entry.
_BY_IMPORTANCE = [StateFormat.U16, StateFormat.FP32]


class StepRow(NamedTuple):
    """The first rank's times; medians."""

    state: str
    apply: str
    pull: str
    weight: str
    """Of the anchor; empty where there is none, as the place is."""
    anchor_device: str
    offload: bool
    world_size: int
    params: int
    state_bytes: int
    """Of isolation on a rank."""
    own_ms: float
    """In our overrides, a hundredth of a refresh included."""
    refresh_ms: float
    """A whole refresh."""
    replaced_ms: float
    """Of plain ZeRO-3's work that isolation does instead."""
    plain_ms: float
    """A plain step: forward, backward and update."""
    overhead: float
    own_parts_ms: dict[str, float]
    """By override, without refreshes."""
    replaced_parts_ms: dict[str, float]
    """By method of ZeRO-3."""
    ratio_median: float | None
    """Median isolating step / median plain step of as many ``pairs``, and its bootstrap 95 % interval."""
    ci_low: float | None
    ci_high: float | None
    pairs: int | None


def cases() -> Iterator[Case]:
    """Yield every combination of isolation that exists, ``adam`` with ``apply: update`` only; then anchors."""
    for offload in (False, True):
        for state in StateFormat:
            for apply in Apply:
                if state is not StateFormat.ADAM or apply is Apply.UPDATE:
                    yield Case(state, apply, offload)
        for pull in Pull:
            yield Case(StateFormat.U16, Apply.REDUCTION, offload, pull)
        for state, pull in product(_BY_IMPORTANCE, Pull):
            yield Case(state, Apply.REDUCTION, offload, pull, weight=AnchorWeight.IMPORTANCE)
        yield Case(StateFormat.U16, Apply.REDUCTION, offload, Pull.UPDATE, device=AnchorDevice.DISK)


def measure_steps(
    world_sizes: Sequence[int],
    *,
    chosen: Sequence[Case],
    pairs: int,
    folder: Path,
    layers: int,
    steps: int,
) -> list[StepRow]:
    """Measure the cases at every world size; whole steps in ``pairs`` for those of `CONFIRMED` without offload.

    folder  on the disk that an anchor is read from; takes 4 bytes a parameter for each engine
    steps   of which the primary figure is the median, and as many plain ones
    """
    rows = []
    for world_size in world_sizes:
        rows += run_on_ranks(_measure_all, world_size, list(chosen), pairs, layers, steps, str(folder))[0]
    return rows


def _measure_all(chosen: Sequence[Case], pairs: int, layers: int, steps: int, folder: str) -> list[StepRow]:
    rows = []
    for offload in dict.fromkeys(case.offload for case in chosen):
        engine = bench_engine(offload=offload, layers=layers)
        # A file that an engine has mapped must not be written to.
        weights = Path(folder, f"{dist.get_world_size()}_ranks{'_offload' if offload else ''}")
        for case in chosen:
            if case.offload is offload:
                confirmed = not offload and case.pull is None and (case.state, case.apply) in CONFIRMED
                rows.append(_measure(engine, case, pairs=pairs if confirmed else 0, steps=steps, weights=weights))
        engine.destroy()
    return rows


def _attached(engine: Any, case: Case, weights: Path) -> Any:
    """Attach isolation to the engine, and an anchor where the case has one; return its handle. Collective."""
    section: dict[str, Any] = {"state": case.state, "apply": case.apply, "ratio": _RATIO, "refresh_interval": 10**9}
    if case.pull is not None:
        section["anchor"] = {"decay": 1.0, "pull": case.pull, "weight": case.weight, "device": case.device}
    if case.weight is AnchorWeight.IMPORTANCE:
        section["memory"] = Memory.STAGE_MAX
    if case.device is AnchorDevice.DISK:
        save_weights(engine, weights)
        section["anchor"]["to"] = str(weights)
    return epi_ds.attach(engine, {**section, "allow_inactive": True})


def _measure(engine: Any, case: Case, *, pairs: int, steps: int, weights: Path) -> StepRow:
    epi = _attached(engine, case, weights)
    classes = TimedClasses(engine.optimizer)
    run_plain, run_isolating = partial(_step, engine, classes.plain), partial(_step, engine, classes.isolating)
    run_isolating()
    if case.weight is AnchorWeight.IMPORTANCE:
        # From here on there is something to pull by.
        epi.finish_stage("first")
    # From here on a mask is in force.
    refreshes = [epi.refresh_now().seconds for _ in range(_REFRESHES)]
    run_plain()
    run_isolating()
    classes.clock.take()
    plain_seconds, plain_parts, isolating_parts = [], [], []
    for _ in range(steps):
        plain_seconds.append(run_plain())
        plain_parts.append(classes.clock.take())
        run_isolating()
        isolating_parts.append(classes.clock.take())
    ours = [owner for owner in isolating_parts[0] if owner.is_ours]
    instead = [owner for owner in plain_parts[0] if owner not in isolating_parts[0]]
    refresh = statistics.median(refreshes)
    own = _median(isolating_parts, ours) + refresh / REFRESH_INTERVAL
    replaced = _median(plain_parts, instead)
    engine.optimizer.__class__ = classes.untimed
    confirmation = _confirm(engine, classes.untimed, pairs) if pairs else (None,) * 3
    plain = statistics.median(plain_seconds)
    report = epi.memory_report()
    detach(engine)
    return StepRow(
        state=case.state.value,
        apply=case.apply.value,
        pull="" if case.pull is None else case.pull.value,
        weight="" if case.pull is None else case.weight.value,
        anchor_device="" if case.pull is None else case.device.value,
        offload=case.offload,
        world_size=report.world_size,
        params=report.covered_numel,
        state_bytes=report.total_bytes,
        own_ms=own * 1e3,
        refresh_ms=refresh * 1e3,
        replaced_ms=replaced * 1e3,
        plain_ms=plain * 1e3,
        overhead=(own - replaced) / plain,
        own_parts_ms=_parts_in_ms(isolating_parts, ours),
        replaced_parts_ms=_parts_in_ms(plain_parts, instead),
        ratio_median=confirmation[0],
        ci_low=confirmation[1],
        ci_high=confirmation[2],
        pairs=pairs or None,
    )


def _median(steps: Sequence[dict[Owner, float]], owners: Sequence[Owner]) -> float:
    """Return the median of the seconds that some owners have of a step together."""
    return statistics.median(sum(parts[owner] for owner in owners) for parts in steps)


def _parts_in_ms(steps: Sequence[dict[Owner, float]], owners: Sequence[Owner]) -> dict[str, float]:
    """Return every owner's median, the largest first."""
    parts = {owner.method: _median(steps, [owner]) * 1e3 for owner in owners}
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def _step(engine: Any, optimizer_class: type) -> float:
    """Run one step by an optimizer of a class; return its seconds. Collective."""
    engine.optimizer.__class__ = optimizer_class
    tokens = tokens_of_a_step()
    dist.barrier()
    started = time.perf_counter()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    return time.perf_counter() - started


def _confirm(engine: Any, isolating: type, pairs: int) -> tuple[float, float, float]:
    """Compare whole steps; return the ratio of the medians and its bootstrap 95 % interval."""
    plain = isolating.__bases__[1]
    seconds: dict[type, list[float]] = {plain: [], isolating: []}
    for pair in range(pairs):
        # Neither is always the second one, which finds warmer caches.
        for optimizer_class in (plain, isolating) if pair % 2 else (isolating, plain):
            seconds[optimizer_class].append(_step(engine, optimizer_class))
    engine.optimizer.__class__ = isolating
    return bootstrap_ratio(seconds[isolating], seconds[plain], random.Random(0).choices)


def bootstrap_ratio(
    ours: Sequence[float], theirs: Sequence[float], choices: Callable[..., list[int]]
) -> tuple[float, float, float]:
    """Return median(ours) / median(theirs), and its 95 % interval from resampled pairs.

    choices  draws ``k`` of a population with replacement, as `random.Random.choices` does
    """
    indices = range(len(ours))

    def ratio(chosen: Sequence[int]) -> float:
        return statistics.median(ours[i] for i in chosen) / statistics.median(theirs[i] for i in chosen)

    resampled = sorted(ratio(choices(indices, k=len(indices))) for _ in range(_RESAMPLES))
    return ratio(indices), resampled[round(_RESAMPLES * 0.025)], resampled[round(_RESAMPLES * 0.975) - 1]
