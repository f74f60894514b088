"""A pull by importance gives the same bits by code as entry by entry, and leaves what did not matter alone."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor

from epi_ds.bench.one_rank import OneRank
from epi_ds.choices import Pull, StateFormat
from epi_ds.isolation.anchor.by_code import by_code
from epi_ds.isolation.anchor.omega import Rooted, omega_of
from epi_ds.isolation.anchor.pulling import Part, pulling
from epi_ds.isolation.importance.mean import Divided, exact_mean
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.views import Importance, Larger, Nothing
from epi_ds.isolation.layout import Parameter, Span, build_layout, merge_spans
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import encode_, pull_
from tests.support.covering import covering
from tests.support.operations import same_bits, values_of

CPU = torch.device("cpu")
SIZE = 0.3
CODED = (StateFormat.U16, StateFormat.BF16)
# The second is not covered, and the third takes several chunks of an entry by entry pull.
PARAMETERS = [[Parameter(name, (numel,)) for name, numel in (("a", 37), ("skip", 5), ("b", 200_003), ("c", 3))]]


def placement_of(rank: int, world_size: int) -> Placement:
    layout = build_layout(PARAMETERS, rank=rank, world_size=world_size, layer="tensor", exclude=["skip"])
    return Placement(layout, (CPU,))


def remembered(placement: Placement, state: StateFormat, num_stages: int) -> Importance:
    """What is remembered of stages, of which each has zeros, a denormal and the largest number somewhere."""
    stages = []
    for stage in range(num_stages):
        stored = StoredImportance(placement, state, seed=0, purpose=str(stage))
        for segment in placement.layout.segments:
            # Where a stage has zeros others have none, but at the first entry.
            values = values_of(segment.real_numel).roll(7 * stage)
            values[:1] = 0.0
            encode_(stored.stored(segment), values, key=stage, step=0)
        stages.append(stored)
    if num_stages == 1:
        return stages[0]
    layout = placement.layout
    return reduce(Larger, [Divided(stored, exact_mean(stored, layout, OneRank())) for stored in stages])


def operands(placement: Placement) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    numel = placement.layout.sub_group_numel[0]
    weights, target, anchor = (torch.randn(numel, generator=generator) for _ in range(3))
    return weights, target, anchor.bfloat16()


def pulled(target: Tensor, weights: Tensor, anchor: Tensor, omega: Divided, *, pull: Pull, at: Placement) -> Tensor:
    """Return a target pulled as an anchor pulls it: span by span, here in parts that begin anywhere."""
    result, pulls = target.clone(), pulling(pull, SIZE, omega, sub_group=0, placement=at)
    for start, stop in merge_spans(Span(one.start, one.stop) for one in at.layout.segments):
        for first, last in ((start, (start + stop) // 2), ((start + stop) // 2, stop)):
            pulls.pull_(Part(first, result[first:last], weights[first:last], anchor[first:last]))
    return result


@pytest.mark.parametrize(
    ("state", "pull", "num_stages", "place"),
    covering(
        [StateFormat.U16, StateFormat.BF16, StateFormat.FP32, StateFormat.U8],
        list(Pull),
        [1, 3],
        [(0, 1), (1, 2), (2, 3)],
        strength=3,
    ),
)
def test_a_pull_has_the_bits_of_its_formula(
    state: StateFormat, pull: Pull, num_stages: int, place: tuple[int, int]
) -> None:
    placement = placement_of(*place)
    importance = remembered(placement, state, num_stages)
    omega = omega_of(importance, pull, layout=placement.layout, exchange=OneRank())
    assert len(by_code(omega, CPU)) == (num_stages if state in CODED else 0)
    weights, target, anchor = operands(placement)
    expected = target.clone()
    for segment in placement.layout.segments:
        own = slice(segment.start, segment.stop)
        factors = omega.read(segment, 0, segment.real_numel).mul_(SIZE)
        if pull is Pull.UPDATE:
            factors = factors.neg_().expm1_()
        pull_(expected[own], weights[own], anchor[own], factors)
    assert same_bits(pulled(target, weights, anchor, omega, pull=pull, at=placement), expected)
    assert not torch.equal(expected, target)


@pytest.mark.parametrize("pull", Pull)
@pytest.mark.parametrize("state", [StateFormat.U16, StateFormat.FP32])
def test_what_did_not_matter_is_not_pulled(pull: Pull, state: StateFormat) -> None:
    placement = placement_of(0, 1)
    for num_stages in (1, 2):
        importance = remembered(placement, state, num_stages)
        omega = omega_of(importance, pull, layout=placement.layout, exchange=OneRank())
        weights, target, anchor = operands(placement)
        found = pulled(target, weights, anchor, omega, pull=pull, at=placement)
        covered = torch.zeros(len(target), dtype=torch.bool)
        for segment in placement.layout.segments:
            covered[segment.start : segment.stop] = importance.read(segment, 0, segment.real_numel) > 0
        assert same_bits(found[~covered], target[~covered])
        assert 0 < int((~covered).sum()) < len(target)


def test_roots_are_rounded_once() -> None:
    placement = placement_of(0, 1)
    values = torch.cat([values_of(1009), torch.tensor([0.0, 2.0**-149, 2.0**-130, torch.finfo(torch.float32).max])])
    before = values.clone()
    # fp64 holds more than twice the bits of the result, so that its own rounding changes nothing.
    assert same_bits(Rooted(Nothing(placement, code_shift=0)).of(values), values.double().sqrt().float())
    assert same_bits(values, before)


def test_importance_that_is_no_function_of_codes_has_no_tables() -> None:
    placement = placement_of(0, 1)
    stored = remembered(placement, StateFormat.U16, 1)
    nothing = Nothing(placement, code_shift=15)
    for importance in (nothing, Divided(nothing, 1.0), Larger(stored, nothing), Larger(nothing, stored)):
        assert by_code(importance, CPU) == []


def test_codes_of_neighbours_are_found_wherever_a_part_begins() -> None:
    for place in ((0, 1), (0, 2), (1, 2), (2, 3)):
        placement = placement_of(*place)
        stored = StoredImportance(placement, StateFormat.U16, seed=0, purpose="")
        for segment in placement.layout.segments:
            encode_(stored.stored(segment), torch.rand(segment.real_numel), key=1, step=0)
            for start in {segment.start, segment.start + segment.real_numel // 2, segment.stop - 1}:
                own = stored.stored(segment).codes[start - segment.start :].view(torch.int16)
                found = stored.codes_within(0, start, segment.stop)
                assert torch.equal(found.view(torch.int16), own)
