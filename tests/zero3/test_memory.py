"""What isolation keeps, measured from the live tensors of real engines: nothing of it grows with the ratio."""

from __future__ import annotations

import pytest

from epi_ds.bench.memory import Case, MemoryRow, Pulled, measure_case
from epi_ds.choices import Apply, StateFormat
from tests.support.ranks import run_ranks
from tests.support.tiers import slow_but

pytestmark = pytest.mark.zero3

# Bytes per parameter, times the world size.
BOUNDS = {
    StateFormat.FP32: 4.2,
    StateFormat.BF16: 2.2,
    StateFormat.U16: 2.2,
    StateFormat.U8: 1.2,
    StateFormat.ADAM: 0.2,
}


def measure(state: str, apply: str, ratios: tuple[float, ...]) -> list[MemoryRow]:
    return [measure_case(Case(StateFormat(state), Apply(apply), ratio)) for ratio in ratios]


def check(rows: list[MemoryRow], state: StateFormat) -> None:
    for row in rows:
        assert row.bytes_per_param_times_world <= BOUNDS[state]
        assert 0 < row.hold_bytes <= row.hold_bytes_bound
        assert 0 < row.refresh_peak_bytes <= row.refresh_peak_bytes_bound
    persistent = [row.bytes_per_param_times_world for row in rows]
    # Below a thousandth of a byte per parameter: the report of a refresh and the like.
    assert max(persistent) - min(persistent) < 1e-3
    # The bits of the masks alone, so that a measurement of nothing would fail.
    assert min(persistent) >= 0.125


@pytest.mark.slow
@pytest.mark.parametrize("state", list(StateFormat))
def test_what_outlives_a_step_does_not_grow_with_the_ratio(state: StateFormat) -> None:
    for rows in run_ranks(measure, 2, state.value, "update", (0.01, 0.5)):
        check(rows, state)


@pytest.mark.parametrize("world_size", slow_but([1, 3, 4], 3))
def test_memory_shrinks_with_the_world(world_size: int) -> None:
    for rows in run_ranks(measure, world_size, "u8", "reduction", (0.2,)):
        check(rows, StateFormat.U8)


def measure_anchor(anchor: str) -> MemoryRow:
    return measure_case(Case(StateFormat.U16, Apply.REDUCTION, 0.2, Pulled(anchor)))


@pytest.mark.parametrize(("anchor", "added"), [(Pulled.BF16, 2.0), (Pulled.FP32, 4.0)])
def test_an_anchor_adds_two_bytes_where_all_values_are_bf16_and_else_four(anchor: Pulled, added: float) -> None:
    """Padding of a partition takes them too, and is far less than a hundredth."""
    for row in run_ranks(measure_anchor, 2, anchor.value):
        assert added + 2.125 <= row.bytes_per_param_times_world <= added + 2.2
