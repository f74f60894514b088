"""The cost model, the limits it must keep, and the command that prints it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from epi_ds.choices import Normalizer, Selection, StateFormat, Transport
from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.isolation.importance.stored import code_shift_of
from epi_ds.isolation.search.bracket import count_dtype, round_widths
from epi_ds.isolation.search.traffic import (
    TYPICAL_KINDS,
    Collective,
    Cost,
    compare,
    cost_of,
    estimate,
    owned_rows,
    pick,
    refresh_messages,
)

SELECTIONS = [
    (Selection.NORMALIZED_GLOBAL, Normalizer.MINMAX),
    (Selection.NORMALIZED_GLOBAL, Normalizer.MEAN),
    (Selection.RAW_GLOBAL, Normalizer.MINMAX),
    (Selection.PER_LAYER, Normalizer.MINMAX),
]


def costs_of(
    selection: Selection,
    normalizer: Normalizer = Normalizer.MINMAX,
    *,
    state: str = "fp32",
    num_layers: int = 1000,
    world_size: int = 1024,
    layer_numel: int = 400_000_000,
) -> tuple[Cost, ...]:
    messages = refresh_messages(
        [layer_numel] * num_layers,
        selection=selection,
        normalizer=normalizer,
        code_shift=code_shift_of(StateFormat(state)),
    )
    return compare(messages, selection=selection, world_size=world_size)


@pytest.mark.parametrize(("selection", "normalizer"), SELECTIONS)
@pytest.mark.parametrize("state", StateFormat)
def test_a_thousand_ranks_and_layers_keep_the_limits(selection: Selection, normalizer: Normalizer, state: str) -> None:
    picked = pick(costs_of(selection, normalizer, state=state))
    limit = 20e6 if selection is Selection.PER_LAYER else 0.1e6
    assert picked.sent_bytes <= limit
    assert picked.transient_bytes <= 64e6


@pytest.mark.parametrize(("selection", "normalizer"), SELECTIONS)
@pytest.mark.parametrize("state", StateFormat)
def test_two_to_eight_collectives_whatever_the_layers(selection: Selection, normalizer: Normalizer, state: str) -> None:
    for num_layers, world_size in itertools.product((1, 35, 1000), (1, 2, 8, 1024)):
        costs = costs_of(selection, normalizer, state=state, num_layers=num_layers, world_size=world_size)
        reference = costs_of(selection, normalizer, state=state)
        assert [cost.collectives for cost in costs] == [cost.collectives for cost in reference]
        assert all(2 <= cost.collectives <= 8 for cost in costs)


def test_auto_gathers_in_small_worlds_and_reduces_in_large_ones() -> None:
    picked = [pick(costs_of(Selection.NORMALIZED_GLOBAL, world_size=size)).transport for size in (1, 2, 64, 1024)]
    assert picked == [Transport.ALL_GATHER, Transport.ALL_GATHER, Transport.ALL_REDUCE, Transport.ALL_REDUCE]


def test_auto_deals_layers_to_ranks_where_that_is_less() -> None:
    assert pick(costs_of(Selection.PER_LAYER)).transport is Transport.REDUCE_SCATTER
    # Three layers padded to a thousand rows would be mostly padding.
    assert pick(costs_of(Selection.PER_LAYER, num_layers=3)).transport is Transport.ALL_REDUCE


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 1024])
def test_bytes_and_steps_of_a_collective(world_size: int) -> None:
    others, size = world_size - 1, 3 * 2**20 * world_size
    gather, reduce, scatter = Collective.ALL_GATHER, Collective.ALL_REDUCE, Collective.REDUCE_SCATTER
    assert gather.sent_bytes(size, world_size) == others * size
    assert scatter.sent_bytes(size, world_size) * world_size == others * size
    # An all-reduce is a reduce-scatter and an all-gather of the shares.
    both = scatter.sent_bytes(size, world_size) + gather.sent_bytes(size // world_size, world_size)
    assert reduce.sent_bytes(size, world_size) == both
    assert reduce.ring_steps(world_size) == gather.ring_steps(world_size) + scatter.ring_steps(world_size) == 2 * others
    assert 2 ** gather.tree_steps(world_size) >= world_size > 2 ** gather.tree_steps(world_size) // 2


def test_the_figures_of_a_large_run_by_hand() -> None:
    """1000 layers below 2^31 entries, 1024 ranks: 1024 rows of 2048 + 1024 + 1024 int32, then 12 bytes a row."""
    cost = cost_of(
        refresh_messages([4000] * 1000, selection=Selection.PER_LAYER, normalizer=Normalizer.MINMAX),
        transport=Transport.REDUCE_SCATTER,
        world_size=1024,
    )
    rounds = 4096 * 4 * 1023 + 3 * 12 * 1023
    extremes, counts = 2 * 1000 * 8, (2 * (1000 + TYPICAL_KINDS) + 2) * 4
    assert cost.sent_bytes == rounds + sum(2 * size * 1023 // 1024 for size in (extremes, counts))
    assert (cost.collectives, cost.ring_steps, cost.tree_steps) == (8, 6 * 1023 + 4 * 1023, 6 * 10 + 4 * 10)


def test_integers_are_as_wide_as_their_sums() -> None:
    assert (count_dtype(2**31 - 1), count_dtype(2**31)) == (torch.int32, torch.int64)
    settings: dict[str, Any] = {"selection": Selection.PER_LAYER, "normalizer": Normalizer.MINMAX}
    narrow, wide = (refresh_messages([numel] * 3, **settings) for numel in (2**31 - 1, 2**31))
    for one, other in zip(narrow, wide, strict=True):
        # An extreme is a code with the parameter that holds it, whatever the counts.
        assert (one.item_bytes, other.item_bytes) == ((8, 8) if one.name == "extremes" else (4, 8))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_every_row_has_one_owner(world_size: int) -> None:
    for num_rows in (0, 1, 2, 6, 7, 8, 63, 64, 65, 200):
        owned = [owned_rows(num_rows, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [row for rows in owned for row in range(num_rows)[rows]] == list(range(num_rows))


@pytest.mark.parametrize(
    ("bits", "most", "widths"),
    [
        (31, 11, (2048, 1024, 1024)),
        (31, 9, (256, 256, 256, 128)),
        (17, 11, (512, 256)),
        (16, 11, (256, 256)),
        (15, 11, (256, 128)),
        (1, 11, (2,)),
    ],
)
def test_rounds_resolve_their_bits(bits: int, most: int, widths: tuple[int, ...]) -> None:
    assert round_widths(bits, most_bits=most) == widths


def test_the_command_prints_one_json_object() -> None:
    result = CliRunner().invoke(
        app, "estimate --world-size 1024 --layers 1000 --selection per_layer --state u16 --json".split()
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["auto"] == "reduce_scatter"
    picked = next(row for row in report["transports"] if row["transport"] == report["auto"])
    expected = pick(costs_of(Selection.PER_LAYER, state="u16", layer_numel=7_000_000))
    assert {key: picked[key] for key in Cost._fields if key != "transport"} == {
        key: value for key, value in expected._asdict().items() if key != "transport"
    }


def test_the_command_marks_what_auto_picks() -> None:
    result = CliRunner().invoke(app, "estimate --world-size 1024 --layers 1000".split())
    assert result.exit_code == 0, result.output
    (marked,) = [line for line in result.output.splitlines() if "<- auto" in line]
    assert marked.split()[:3] == ["all_reduce", "6", "0.062"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": Normalizer.MEAN, "selection": Selection.PER_LAYER}, "ignored by per_layer"),
        ({"parameters": 3}, "3 parameters cannot fill 4 layers"),
    ],
)
def test_an_estimate_of_nonsense_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "world_size": 2,
        "num_layers": 4,
        "parameters": 100,
        "selection": Selection.RAW_GLOBAL,
        "normalizer": Normalizer.MINMAX,
        "state": StateFormat.FP32,
    }
    with pytest.raises(UserError, match=message):
        estimate(**arguments | change)  # type: ignore[arg-type]
