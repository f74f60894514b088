"""A save or a load on one rank alone names the ranks that did not come."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from epi_ds.checkpoint import meeting
from epi_ds.errors import LostRankError
from tests.support.engines import collected_logs, ds_config, engine_of, train_step
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3


def alone(folder: str, what: str, timeout: float, has_ended: bool) -> tuple[str, list[str]]:
    """Have rank 0 save or load while rank 1 does something else; return what rank 0 says, and what it logs."""
    kept = meeting._timeout_seconds, meeting._WARNS_AFTER_SECONDS
    store = distributed_c10d._get_default_store()
    meeting._timeout_seconds, meeting._WARNS_AFTER_SECONDS = lambda: timeout, 0.5  # type: ignore[misc]
    try:
        with collected_logs() as messages, engine_of(OddNet, ds_config(epi={"ratio": 0.2})) as engine:
            train_step(engine, 0, odd_batch)
            said = ""
            if dist.get_rank() == 0:
                with pytest.raises(LostRankError) as raised:
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
        meeting._timeout_seconds, meeting._WARNS_AFTER_SECONDS = kept  # type: ignore[misc]
        if has_ended and dist.get_rank() == 1:
            store.delete_key(meeting._ended(1))


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
