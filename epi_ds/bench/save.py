"""``epi-ds bench save``: what a checkpoint that is whole or absent costs over DeepSpeed's own.

DeepSpeed syncs nothing: what it saved a minute before the machine fails may be empty after. So its save is compared
followed by an fsync of every file, each by the rank that wrote it; ours syncs while the next file is being written.
The two are taken in turn by one engine, and the ratio is the median of those of the pairs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

import epi_ds
from epi_ds.bench.engine import bench_engine, tokens_of_a_step
from epi_ds.bench.ranks import run_on_ranks
from epi_ds.checkpoint.catalog import open_checkpoint
from epi_ds.checkpoint.durable import sync_file
from epi_ds.checkpoint.loading import verify
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.choices import StateFormat
from epi_ds.zero3.attach import detach

_PLAIN, _OURS = "plain", "whole"


class SaveRow(NamedTuple):
    """The first rank's times; medians of ``pairs``, in seconds."""

    state: str
    world_size: int
    params: int
    plain_bytes: int
    """Of DeepSpeed's files, all ranks'."""
    saved_bytes: int
    """Of ours and DeepSpeed's."""
    plain: float
    """DeepSpeed's own save."""
    plain_fsync: float
    """The fsync of its files after it."""
    saved: float
    """Our save, until the checkpoint has its name."""
    ratio: float
    """saved / (plain + plain_fsync)."""
    ratio_low: float
    """Of the smallest pair, and the largest."""
    ratio_high: float
    ratio_of_best: float
    """Of the quickest of each, for disks, and virtual machines' memory, that are now quick and now slow."""
    shares: dict[str, float]
    """Of ``saved``. Checksum and fsync run in threads beside the writing; waiting for them and the manifest do not."""
    verify: float
    """Reading and checking every file, shared among the ranks, as each load does first."""
    pairs: int


def measure_saves(
    world_size: int, *, states: Sequence[StateFormat], pairs: int, layers: int, folder: Path
) -> list[SaveRow]:
    """Measure saves of one model with each state, into a new folder below ``folder``, which is removed."""
    with tempfile.TemporaryDirectory(prefix="epi_ds_bench_", dir=folder) as place:
        rows: list[SaveRow] = run_on_ranks(_measure_all, world_size, list(states), pairs, layers, place)[0]
    return rows


def _measure_all(states: Sequence[StateFormat], pairs: int, layers: int, place: str) -> list[SaveRow]:
    engine = bench_engine(offload=False, layers=layers)
    rows = []
    for state in states:
        # Of the parameters alone is the rest; `adam` goes with `update` only.
        section = {"state": state, "apply": "update", "ratio": 0.01, "refresh_interval": 10**9, "allow_inactive": True}
        epi_ds.attach(engine, section)
        rows.append(_measure(engine, state, pairs, Path(place)))
        detach(engine)
    return rows


def _measure(engine: Any, state: StateFormat, pairs: int, place: Path) -> SaveRow:
    tokens = tokens_of_a_step()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    # Before the first pair: imports, and the folder's take-over.
    _save(engine, place)
    _save_plain(engine, place)
    plain, plain_fsync, saved, times = [], [], [], []
    for pair in range(pairs):
        # Neither always finds the disk as the other left it.
        for is_plain in (True, False) if pair % 2 else (False, True):
            if is_plain:
                write, sync = _save_plain(engine, place)
                plain.append(write)
                plain_fsync.append(sync)
            else:
                saved.append(_save(engine, place))
                times.append(engine.epi.run.last_save)
    plain_bytes, saved_bytes = (_bytes_of(place / name) for name in (_PLAIN, _OURS))
    ratios = sorted(ours / (write + sync) for ours, write, sync in zip(saved, plain, plain_fsync, strict=True))
    shares = {
        "checksum, in threads": [one.digest / one.total for one in times],
        "fsync, in threads": [one.sync / one.total for one in times],
        "waiting for the threads": [one.wait / one.total for one in times],
        "manifest": [one.manifest / one.total for one in times],
    }
    checkpoint = on_first_rank(lambda: open_checkpoint(place / _OURS))
    seconds_to_verify = _timed(lambda: verify(checkpoint))
    report = engine.epi.memory_report()
    return SaveRow(
        state=state.value,
        world_size=report.world_size,
        params=report.covered_numel,
        plain_bytes=plain_bytes,
        saved_bytes=saved_bytes,
        plain=statistics.median(plain),
        plain_fsync=statistics.median(plain_fsync),
        saved=statistics.median(saved),
        ratio=statistics.median(ratios),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        ratio_of_best=min(saved) / min(write + sync for write, sync in zip(plain, plain_fsync, strict=True)),
        shares={name: statistics.median(share) for name, share in shares.items()},
        verify=seconds_to_verify,
        pairs=pairs,
    )


def _save(engine: Any, place: Path) -> float:
    """Save as we do; return the seconds. Collective."""
    _make_room(place / _OURS)
    seconds = _timed(lambda: engine.save_checkpoint(str(place), _OURS, save_latest=False))
    if engine.epi.run.failed is not None:
        raise RuntimeError(f"{engine.epi.run.failed} was not saved; the log says why")
    return seconds


def _save_plain(engine: Any, place: Path) -> tuple[float, float]:
    """Save as DeepSpeed does by itself; return its seconds, and those of the fsync after it. Collective."""
    _make_room(place / _PLAIN)
    isolating = type(engine), type(engine.optimizer)
    engine.__class__, engine.optimizer.__class__ = (one.__bases__[1] for one in isolating)
    try:
        write = _timed(lambda: engine.save_checkpoint(str(place), _PLAIN, save_latest=False))
    finally:
        engine.__class__, engine.optimizer.__class__ = isolating
    return write, _timed(lambda: _sync_own(place / _PLAIN))


def _sync_own(folder: Path) -> None:
    """Sync what this rank wrote of a tag of DeepSpeed's."""
    for path in folder.glob(f"*rank_{dist.get_rank()}_*"):
        sync_file(path)


def _make_room(folder: Path) -> None:
    """Remove what is to be written, and let the disk come to rest. Collective."""

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()

    on_first_rank(remove)


def _timed(run: Callable[[], object]) -> float:
    """Run on all ranks; return the seconds until the last one was done."""
    dist.barrier()
    started = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - started


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
