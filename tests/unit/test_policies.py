"""Controls and other methods: what they rank by, and when they select."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from epi_ds.choices import Redraw
from epi_ds.config import parse_config
from epi_ds.isolation.importance.codes import TOP_CODE, codes_of
from epi_ds.isolation.layout import Layout, Parameter, Segment, build_layout
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.policies.half import ChosenHalf, still_half
from epi_ds.isolation.policies.inverted import mirrored
from epi_ds.isolation.policies.momentum import SmallestMomenta
from epi_ds.isolation.policies.random import RandomRanks
from epi_ds.isolation.policy import make_policy
from epi_ds.kernels import random_codes

CPU = torch.device("cpu")


def _placed(parameters: Sequence[Parameter], *, rank: int = 0, world_size: int = 1) -> Placement:
    layout = build_layout([list(parameters)], rank=rank, world_size=world_size, layer="block")
    return Placement(layout, (CPU,))


def _whole(parameters: Sequence[Parameter], world_size: int, *, draw: int) -> dict[str, Tensor]:
    """Put the ranks of all partitions together."""
    parts: dict[str, list[Tensor]] = {parameter.name: [] for parameter in parameters}
    for rank in range(world_size):
        placement = _placed(parameters, rank=rank, world_size=world_size)
        ranks = RandomRanks(placement, seed=3, draw=draw)
        for segment in placement.layout.segments:
            cut = segment.real_numel // 3
            parts[segment.name] += [ranks.read(segment, 0, cut), ranks.read(segment, cut, segment.real_numel)]
    return {name: torch.cat(found) for name, found in parts.items()}


def test_a_draw_is_the_same_at_every_partitioning_and_another_one_is_not() -> None:
    parameters = [Parameter("a.0.w", (7, 13)), Parameter("a.1.w", (7, 13)), Parameter("b", (1,))]
    whole = _whole(parameters, 1, draw=0)
    for world_size in (2, 3, 4, 64):
        for name, ranks in _whole(parameters, world_size, draw=0).items():
            assert torch.equal(ranks, whole[name]), (world_size, name)
    assert not torch.equal(whole["a.0.w"], whole["a.1.w"])
    assert not torch.equal(whole["a.0.w"], _whole(parameters, 1, draw=1)["a.0.w"])


def test_ranks_are_codes_of_positive_finite_numbers_spread_evenly() -> None:
    codes = random_codes(12345, (1 << 32) - 1000, 1 << 18, device=CPU)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= 1
    assert int(codes.max()) < TOP_CODE
    # The index does not wrap at 2^32.
    assert torch.equal(codes[1000:], random_codes(12345, 1 << 32, (1 << 18) - 1000, device=CPU))
    assert not torch.equal(codes[1000:2000], random_codes(12345, 0, 1000, device=CPU))
    counts = np.histogram(codes.numpy(), bins=64, range=(0, TOP_CODE))[0]
    # 4096 expected, standard deviation 64.
    assert abs(counts - 4096).max() < 5 * 64


@pytest.mark.parametrize("shift", [0, 15, 16])
def test_the_mirror_turns_the_order_round_and_keeps_zeros_and_the_lattice(shift: int) -> None:
    codes = torch.randint(0, TOP_CODE, (10_000,), generator=torch.Generator().manual_seed(1)) >> shift << shift
    codes[:3] = torch.tensor([0, 1 << shift, TOP_CODE - (1 << shift)])
    values = codes.int().view(torch.float32)
    turned = codes_of(mirrored(values)).long()
    assert torch.equal(turned == 0, codes == 0)
    assert not (turned % (1 << shift)).any()
    assert int(turned.max()) < TOP_CODE
    order = codes[codes > 0].argsort()
    assert (turned[codes > 0][order].diff() <= 0).all()
    assert torch.equal(mirrored(mirrored(values)), values)


class _Given:
    code_shift = 0

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        return self._values[start:stop]


def test_the_smallest_momenta_come_first_and_those_of_zero_before_them() -> None:
    momenta = torch.tensor([0.5, 0.0, 2.0, 1e-3, 0.0])
    (segment,) = _placed([Parameter("w", (5,))]).layout.segments
    ranks = SmallestMomenta(_Given(momenta)).read(segment, 0, 5)
    assert ranks[1] == ranks[4] == torch.finfo(torch.float32).max
    assert ranks[[1, 3, 0, 2]].diff().lt(0).all()
    assert bool((ranks > 0).all())


def _llama(num_blocks: int, *, experts: int = 0) -> list[Parameter]:
    attention = [f"self_attn.{one}_proj.weight" for one in "qkvo"]
    inside = [f"mlp.experts.{index}." for index in range(experts)] or ["mlp."]
    network = [f"{module}{one}_proj.weight" for module in inside for one in ("gate", "up", "down")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    found = [Parameter("model.embed_tokens.weight", (11, 4))]
    for block in range(num_blocks):
        where = f"model.layers.{block}."
        found += [Parameter(where + name, (4, 4)) for name in (*attention, *network)]
        found += [Parameter(where + name, (4,)) for name in norms]
    return [*found, Parameter("model.norm.weight", (4,)), Parameter("lm_head.weight", (11, 4))]


def _layout(parameters: Sequence[Parameter]) -> Layout:
    return _placed(parameters).layout


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("choice", range(5))
def test_half_of_every_category_stands_still(choice: int, experts: int) -> None:
    """The paper's rule: two of four, of three two in half of the blocks and one in the others, one of two norms."""
    still = still_half(_layout(_llama(6, experts=experts)).segments, name=str(choice))
    networks = []
    for block in range(6):
        names = [name for name in still if f"layers.{block}." in name]
        assert sum("self_attn" in name for name in names) == 2
        assert sum("norm" in name for name in names) == 1
        networks += [
            sum(f"mlp.experts.{index}." in name if experts else "mlp." in name for name in names)
            for index in range(experts or 1)
        ]
    assert sorted(networks) == [1] * (len(networks) // 2) + [2] * (len(networks) // 2)
    assert all("layers" in name for name in still)


def test_a_choice_of_half_depends_on_its_name_and_not_on_the_partitioning() -> None:
    parameters = _llama(4)
    choices = [still_half(_layout(parameters).segments, name=str(number)) for number in range(8)]
    assert len(set(choices)) == 8
    placements = [_placed(parameters, rank=rank, world_size=3) for rank in range(3)]
    chosen = [ChosenHalf(placement, seed=0, draw=2) for placement in placements]
    assert {one.entries for one in chosen} == {ChosenHalf(_placed(parameters), seed=0, draw=2).entries}
    assert chosen[0].entries == 16 * (4 * 2 + 6) + 4 * 4
    for placement, one in zip(placements, chosen, strict=True):
        for segment in placement.layout.segments:
            values = one.read(segment, 0, segment.real_numel)
            assert bool((values == float(segment.name in still_half(placement.layout.segments, name="0/half/2"))).all())


def test_a_bias_stands_still_with_its_matrix_and_modules_without_neighbours_take_turns() -> None:
    names = [f"h.{block}.mlp.{part}" for block in range(4) for part in ("fc.weight", "fc.bias")]
    parameters = [Parameter(name, (4, 4) if "weight" in name else (4,)) for name in names]
    still = still_half(_layout(parameters).segments, name="x")
    assert len(still) == 4
    assert {name.removesuffix(".bias") + ".weight" for name in still if "bias" in name} == {
        name for name in still if "weight" in name
    }
    assert still_half(_layout([Parameter("head.weight", (4, 4))]).segments, name="x") == frozenset()


@pytest.mark.parametrize(
    ("section", "selected", "measured"),
    [
        ({"policy": "first", "refresh_interval": 3, "warmup_steps": 4}, [6], 6),
        ({"policy": "inverted", "refresh_interval": 3, "warmup_steps": 4}, [6, 9], 10),
        ({"policy": "momentum", "ratio": 0.9, "warmup_steps": 8}, [8, 9, 10], 0),
        ({"policy": "random"}, [0], 0),
        ({"policy": "random", "warmup_steps": 4}, [4], 0),
        ({"policy": "random", "redraw": "stage"}, [0], 0),
        ({"policy": "random", "redraw": "refresh", "refresh_interval": 4}, [0, 4, 8], 0),
        ({"policy": "random", "redraw": "refresh", "refresh_interval": 4, "warmup_steps": 6}, [6, 8], 0),
        ({"policy": "half"}, [0], 0),
    ],
)
def test_when_a_policy_selects_and_how_long_it_measures(
    section: dict[str, Any], selected: list[int], measured: int
) -> None:
    policy = make_policy(parse_config(section))
    at_start = [0] if policy.selects_at_start else []
    assert at_start + [step for step in range(1, 11) if policy.refreshes(step)] == selected
    assert [step for step in range(1, 11) if policy.observes(step)] == list(range(1, measured + 1))
    stages = section["policy"] == "half" or section.get("redraw") == "stage"
    assert policy.selects_at_stage_ends == stages


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"policy": "momentum", "ratio": 0.01, "refresh_interval": 500},
        {"policy": "momentum", "ratio": 0.9},
        {"policy": "half", "ratio": 0},
        {"policy": "random", "redraw": "refresh", "refresh_interval": 500},
        {"policy": "inverted", "selection": "per_layer"},
    ],
)
def test_a_section_without_defaults_is_read_back_as_it_was(section: dict[str, Any]) -> None:
    """A default of all policies may be a setting of one whose own default is another."""
    config = parse_config(section)
    assert parse_config(config.as_section()) == config
    assert config.as_section().keys() <= section.keys() | {"layer", "selection", "apply", "refresh_interval"}


def test_what_a_policy_begins_from_can_be_changed_where_it_works() -> None:
    momentum = parse_config({"policy": "momentum", "ratio": 0.9})
    assert (momentum.layer, momentum.selection, momentum.apply) == ("tensor", "per_layer", "update")
    assert momentum.refresh_interval == 1
    assert parse_config({"policy": "momentum", "ratio": 0.9, "refresh_interval": 5}).refresh_interval == 5
    assert parse_config({"policy": "random"}).selection == "raw_global"
    assert parse_config({"policy": "random", "selection": "per_layer"}).selection == "per_layer"
    half = parse_config({"policy": "half"})
    assert (half.ratio, parse_config({"policy": "half", "ratio": 0}).ratio) == (0.5, 0.0)
    assert parse_config({"policy": "random", "redraw": "stage"}).redraw is Redraw.STAGE
