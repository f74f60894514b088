"""Ranks that are told to end agree on a step; tests/end_to_end/test_preemption.py has whole runs."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch.distributed as dist

import epi_ds
from epi_ds.errors import CheckpointError, UserError
from epi_ds.launch import stop_signals
from tests.support.engines import ds_config, engine_of
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

SECTION = {"ratio": 0.2, "refresh_interval": 2}


def check_agreement(folder: str, heard_by: tuple[int, ...], number: int) -> None:
    config = ds_config(epi=SECTION, accumulation=2)
    with engine_of(OddNet, config) as engine:
        try:
            preemption = epi_ds.Preemption(engine)
            due = []
            for micro_batch in range(6):
                engine.backward(engine(*odd_batch(0, dist.get_rank(), micro_batch)))
                # In the second step, within its accumulation window.
                if micro_batch == 2 and dist.get_rank() in heard_by:
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), signal.SIGCONT)
                engine.step()
                due.append(preemption.is_due())
                assert bool(preemption.cause) is due[-1]
            # Not before the window is closed, and then for good.
            assert due == [False, False, False, True, True, True]
            assert preemption.cause == signal.Signals(number).name
            with pytest.raises(CheckpointError, match=r"told to end \(SIG.*\) after step 3, and the last 3 are in no"):
                preemption.leave()
            assert engine.save_checkpoint(folder)
            assert engine.epi.run.saved_step == 3
        finally:
            stop_signals.stop_listening()


@pytest.mark.parametrize(
    ("world_size", "heard_by", "number"),
    [(1, (0,), signal.SIGTERM), (2, (1,), signal.SIGUSR1), (3, (0, 2), signal.SIGTERM)],
)
def test_one_rank_that_hears_it_is_enough(
    tmp_path: Any, world_size: int, heard_by: tuple[int, ...], number: int
) -> None:
    run_ranks(check_agreement, world_size, str(tmp_path), heard_by, number)


def check_plain_engine() -> None:
    with (
        engine_of(OddNet, ds_config()) as engine,
        pytest.raises(UserError, match="Preemption needs an engine with isolation"),
    ):
        epi_ds.Preemption(engine)


def test_a_plain_engine_is_refused() -> None:
    run_ranks(check_plain_engine, 1)
