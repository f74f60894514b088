"""How long a recipe's collectives wait for a rank that stands still."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import groups
from torch.distributed.distributed_c10d import _set_pg_timeout

from epi_ds.train.accelerate_setup import DEFAULT_TIMEOUT_SECONDS, prepare_accelerate
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3


def zero3_timeout(seconds: float) -> timedelta:
    try:
        prepare_accelerate(timeout_seconds=seconds)
        group = groups._get_data_parallel_group()
        found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
        # The next call in these ranks waits as long as it did.
        _set_pg_timeout(timedelta(seconds=DEFAULT_TIMEOUT_SECONDS), group)
        return found
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_zero3_waits_as_long_as_the_recipe_says() -> None:
    """Over a group of its own, which DeepSpeed makes with torch's time-out."""
    assert run_ranks(zero3_timeout, 2, 77.0) == [timedelta(seconds=77)] * 2
