"""A save, a load or a call of `engine.epi` on one rank alone names the ranks that did not come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from epi_ds.checkpoint import meeting
from epi_ds.errors import LostRankError
from tests.support.engines import collected_logs, ds_config, engine_of, train_step
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3


@contextmanager
def impatient(timeout: float) -> Iterator[None]:
    """Wait for other ranks so many seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "_timeout_seconds", lambda: timeout)
        patch.setattr(meeting, "_WARNS_AFTER_SECONDS", 0.5)
        yield


def alone(folder: str, what: str, timeout: float, has_ended: bool) -> tuple[str, list[str]]:
    """Have rank 0 save or load while rank 1 does something else; return what rank 0 says, and what it logs."""
    store = distributed_c10d._get_default_store()
    try:
        with collected_logs() as messages, engine_of(OddNet, ds_config(epi={"ratio": 0.2})) as engine:
            train_step(engine, 0, odd_batch)
            said = ""
            if dist.get_rank() == 0:
                with impatient(timeout), pytest.raises(LostRankError) as raised:
                    getattr(engine, what)(folder)
                said = str(raised.value)
                store.set(f"{folder}/{what}", "given up")
            else:
                if has_ended:
                    # As it does when the process ends.
                    meeting._say_ended(store, 1)
                # The ranks of the pool are to have come as often as each other.
                store.wait([f"{folder}/{what}"])
                meeting.meet(what)
            return said, messages
    finally:
        if has_ended and dist.get_rank() == 1:
            store.delete_key(meeting._ended(1))


CALLS: dict[str, Callable[[Any], object]] = {
    "mask": lambda epi: epi.mask(epi.parameter_names[0]),
    "importance": lambda epi: epi.importance(epi.parameter_names[0]),
    "anchor": lambda epi: epi.anchor(epi.parameter_names[0]),
    "refresh_now": lambda epi: epi.refresh_now(),
    "finish_stage": lambda epi: epi.finish_stage("a"),
    "remember": lambda epi: epi.remember("base", []),
    "probe": lambda epi: epi.probe([]),
}


def all_but_one_have_come(store: Any, key: str) -> bool:
    """Wait for all ranks but one, however late they are on a busy machine, and say whether that one is there too."""
    while store.add(key.replace("everyone", "come"), 0) < dist.get_world_size() - 1:
        time.sleep(0.01)
    return bool(store.check([key]))


def calls_alone(absent: int) -> dict[str, str]:
    """Have all ranks but one call what is for all of them; return what each call raises, by its name."""
    store = distributed_c10d._get_default_store()
    section = {"ratio": 0.2, "memory": "stage_max", "anchor": {"decay": 1.0}}
    with engine_of(OddNet, ds_config(epi=section)) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "_comes", all_but_one_have_come)
        train_step(engine, 0, odd_batch)
        said = {}
        for name, call in CALLS.items():
            if dist.get_rank() == absent:
                # All others have given up, and are to have come as often as this one.
                for rank in range(dist.get_world_size()):
                    if rank != absent:
                        store.wait([f"{name}/{absent}/{rank}"])
                meeting.meet(f"engine.epi.{name}()")
            else:
                with impatient(0.0), pytest.raises(LostRankError) as raised:
                    call(engine.epi)
                said[name] = str(raised.value)
                store.set(f"{name}/{absent}/{dist.get_rank()}", "given up")
        return said


def gathers(steps: int) -> list[int]:
    """Return how often ranks met while every mask was looked at, after each step and in all."""
    times = []
    with engine_of(OddNet, ds_config(epi={"ratio": 0.2})) as engine:
        for step in range(steps):
            train_step(engine, step, odd_batch)
            before = meeting._times.get("engine.epi.mask()", 0)
            for name in (*engine.epi.parameter_names, *engine.epi.parameter_names):
                engine.epi.mask(name)
            times.append(meeting._times["engine.epi.mask()"] - before)
        store = distributed_c10d._get_default_store()
        number = meeting._times["engine.epi.mask()"]
        # Nobody needs those of the ones before.
        assert store.check([f"epi_ds/engine.epi.mask()/{number}/everyone"])
        assert not store.check([f"epi_ds/engine.epi.mask()/{number - 1}/everyone"])
    return times


def late(folder: str) -> bool:
    """Save where one rank comes seconds after the other."""
    with engine_of(OddNet, ds_config(epi={"ratio": 0.2})) as engine:
        train_step(engine, 0, odd_batch)
        time.sleep(1.2 * dist.get_rank())
        return bool(engine.save_checkpoint(folder))


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    (said, logged), _ = run_ranks(alone, 2, str(tmp_path), "save_checkpoint", 1.5, False)
    assert "save_checkpoint is for all ranks together, and rank 1 has not called it within 2 s" in said
    assert "outside of what one rank does alone (if rank == 0)" in said
    # Long before, in a run of half an hour's time-out.
    assert any("rank 0: save_checkpoint is for all ranks together, and rank 1 has not" in text for text in logged)
    assert not list(tmp_path.iterdir())
    (said, logged), _ = run_ranks(alone, 2, str(tmp_path), "load_checkpoint", 60.0, True)
    assert "load_checkpoint is for all ranks together, and rank 1 has not called it and will not" in said
    assert run_ranks(late, 2, str(tmp_path)) == [True, True]


@pytest.mark.parametrize(("ranks", "absent"), [(2, 1), (3, 0)])
def test_a_call_that_a_rank_does_not_make_names_it(ranks: int, absent: int) -> None:
    results = run_ranks(calls_alone, ranks, absent)
    assert not results[absent]
    for rank in set(range(ranks)) - {absent}:
        for name in CALLS:
            came = "rank 0 has" if ranks == 2 else "ranks 1, 2 have"
            said = f"engine.epi.{name}() is for all ranks together, and rank {absent} has not called it within 0 s"
            assert results[rank][name].startswith(f"{said} ({came}). ")
            assert "Call it on every rank, outside of what one rank does alone (if rank == 0)" in results[rank][name]


def test_a_loop_over_parameters_meets_once_between_two_steps() -> None:
    assert run_ranks(gathers, 2, 3) == [[1, 1, 1]] * 2
