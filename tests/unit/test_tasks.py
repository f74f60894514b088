"""One budget shared among tasks by what they have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epi_ds.config import EPIConfig
from epi_ds.errors import UserError
from epi_ds.isolation.importance.codes import TOP_CODE, codes_of
from epi_ds.isolation.importance.remembered import Remembered
from epi_ds.isolation.importance.tasks import task_shares
from epi_ds.isolation.importance.views import Nothing
from epi_ds.isolation.layout import Parameter, build_layout
from epi_ds.isolation.placement import Placement
from tests.support.tasks import CPU, WholeSelection

SHAPES = {"0.w": (301, 17), "1.w": (1009,), "1.b": (3,), "2.w": (97, 53)}
SELECTIONS = [
    {"selection": "normalized_global", "normalizer": "minmax"},
    {"selection": "normalized_global", "normalizer": "mean"},
    {"selection": "raw_global"},
    {"selection": "per_layer"},
]


def importance_of(seed: int, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Log-normal, a fifth of it zero; layers are of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        values = torch.exp(1.5 * torch.randn(shape, generator=generator)) * scale * 10.0**index
        found[name] = values.masked_fill_(torch.rand(shape, generator=generator) < 0.2, 0.0)
    return found


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("ratio", [0.01, 0.2])
def test_the_budget_is_full_and_never_exceeded(selection: dict[str, str], ratio: float) -> None:
    """Whole ties are isolated, the greatest scores first, as long as they fit: sorting says the same."""
    section = {"ratio": ratio, **selection}
    found = WholeSelection(section, present=importance_of(0), finished={"a": importance_of(1), "b": importance_of(2)})
    scores, masks = found.scores(), found.masks()
    layers = {"0": ["0.w"], "1": ["1.w", "1.b"], "2": ["2.w"]}
    groups = list(layers.values()) if selection["selection"] == "per_layer" else [list(SHAPES)]
    for names in groups:
        values = torch.cat([scores[name].flatten() for name in names])
        mask = torch.cat([masks[name].flatten() for name in names])
        budget = int(ratio * len(values) + 1e-9)
        assert 0 < int(mask.sum()) <= budget
        assert values[mask].min() > values[~mask].max()
        assert int((values >= values[~mask].max()).sum()) > budget
    # Extremes, the mean's sums, two rounds of scales, three of the search; the counts of the report come on top.
    assert len(found.exchange.lengths) + 1 <= 8


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: "-".join(s.values()))
def test_equal_tasks_share_the_whole_budget(selection: dict[str, str]) -> None:
    """However much larger the gradients of one of them are."""
    one = importance_of(3)
    alone = WholeSelection({"ratio": 0.1, **selection}, present=one, finished={})
    assert alone.comparison.tasks is None
    larger = {name: values * 1024 for name, values in one.items()}
    both = WholeSelection({"ratio": 0.1, **selection}, present=larger, finished={"a": one, "b": one})
    for name, mask in alone.masks().items():
        assert torch.equal(both.masks()[name], mask), name
    for share in both.shares():
        # Scales are known to 1/64 binade, so one of them ends up a little ahead of the others.
        assert share.isolated == pytest.approx(count(alone.masks()), rel=0.01)
        assert share.jaccard == pytest.approx((1.0, 1.0, 1.0), rel=0.01)


def halves(values: dict[str, Tensor], *, keep_even: bool) -> dict[str, Tensor]:
    """Importance of one half of the entries only."""
    found = {}
    for name, each in values.items():
        even = torch.arange(each.numel()).view(each.shape) % 2 == 0
        found[name] = torch.where(even == keep_even, each, 0.0)
    return found


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: "-".join(s.values()))
def test_tasks_with_nothing_in_common_get_equal_shares(selection: dict[str, str]) -> None:
    """Two of three are the same task, which does not get twice the share for that."""
    even, odd = halves(importance_of(4), keep_even=True), halves(importance_of(5, scale=1e-6), keep_even=False)
    section = {"ratio": 0.1, **selection}
    for finished in ({"a": even}, {"a": even, "again": even}):
        found = WholeSelection(section, present=odd, finished=finished)
        assert found.thresholds is not None
        budget, shares = found.thresholds.budget, found.shares()
        assert shares[-1].name is None
        assert shares[0].jaccard[-1] == 0.0
        for share in shares:
            # Shares differ where the tails do: they were cut at a third of the budget each, and are a half.
            assert share.isolated == pytest.approx(budget / 2, rel=0.06)


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: "-".join(s.values()))
def test_the_more_tasks_overlap_the_more_of_each_is_protected(selection: dict[str, str]) -> None:
    section, present, sizes = {"ratio": 0.1, **selection}, importance_of(6), []
    for noise in (0.0, 0.3, 1.0, 3.0):
        generator = torch.Generator().manual_seed(7)
        other = {n: v * torch.exp(noise * torch.randn(v.shape, generator=generator)) for n, v in present.items()}
        found = WholeSelection(section, present=present, finished={"a": other})
        one, two = found.shares()
        sizes.append(one.isolated)
        overlap = one.jaccard[1]
        assert overlap is not None
        assert one.jaccard == (1.0, overlap)
        assert two.jaccard == (overlap, 1.0)
        # Inclusion and exclusion: the union of what both have is the mask.
        both = overlap * (one.isolated + two.isolated) / (1 + overlap)
        assert one.isolated + two.isolated - both == pytest.approx(count(found.masks()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[-1]


def test_shares_and_extremes_are_those_of_the_scores() -> None:
    values = {"a": importance_of(1), "b": importance_of(2)}
    found = WholeSelection({"ratio": 0.1}, present=importance_of(0), finished=values)
    tasks, thresholds = found.comparison.tasks, found.thresholds
    assert tasks is not None
    assert thresholds is not None
    scores, names = found.scores(), list(SHAPES)
    layers = [["0.w"], ["1.w", "1.b"], ["2.w"]]
    for layer, members in enumerate(layers):
        largest = max(members, key=lambda name: float(scores[name].max()))
        assert int(thresholds.extremes.max_codes[layer]) == int(codes_of(scores[largest]).max())
        assert names[int(thresholds.extremes.holders[layer])] == largest
        assert int(thresholds.extremes.min_codes[layer]) <= min(int(codes_of(scores[name]).min()) for name in members)
    isolated = []
    for index in range(3):
        parts = []
        for segment in found.layout.segments:
            codes = codes_of(tasks._scores(index, segment, 0, segment.real_numel))
            parts.append(codes >= int(found.threshold_codes[segment.layer]))
        isolated.append(torch.cat(parts))
    for one, share in zip(isolated, found.shares(), strict=True):
        assert share.isolated == int(one.sum())
        assert share.jaccard == tuple(int((one & other).sum()) / int((one | other).sum()) for other in isolated)
    assert [share.name for share in found.shares()] == ["a", "b", None]


def test_tasks_without_importance_take_nothing() -> None:
    """A task that needs nothing, a flat layer, and a budget below one entry for each task."""
    silent = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    flat = importance_of(8) | {"2.w": torch.ones(SHAPES["2.w"])}
    for section in SELECTIONS:
        found = WholeSelection({"ratio": 0.1, **section}, present=flat, finished={"a": silent})
        assert found.shares()[0].isolated == 0
        assert found.shares()[0].jaccard[0] is None
        assert found.shares()[1].isolated == count(found.masks()) > 0
        none = WholeSelection({"ratio": 0.1, **section}, present=silent, finished={"a": silent})
        assert count(none.masks()) == 0
        tiny = {name: values for name, values in importance_of(9).items() if name == "1.b"}
        one = WholeSelection({"ratio": 0.5, **section}, present=tiny, finished={"a": tiny, "b": tiny})
        assert count(one.masks()) <= 1
    assert none.comparison.tasks is not None


def test_the_past_alone_and_no_past() -> None:
    section = {"ratio": 0.1, "protects": "past", "selection": "raw_global"}
    present, past = importance_of(1), importance_of(2)
    nothing = WholeSelection(section, present=present, finished={})
    assert isinstance(nothing.comparison.compared, Nothing)
    assert count(nothing.masks()) == 0
    assert (nothing.threshold_codes <= TOP_CODE).all()
    one = WholeSelection(section, present=present, finished={"a": past})
    order = torch.cat([values.flatten() for values in past.values()]).sort().values
    budget = int(0.1 * len(order))
    for name, mask in one.masks().items():
        assert torch.equal(mask, past[name] >= order[-budget]), name


def test_a_stage_that_comes_again_is_the_same_task() -> None:
    layout = build_layout([[Parameter("w", (5,))]], rank=0, world_size=1, layer="block")
    config = EPIConfig.model_validate({"memory": "per_task", "state": "fp32"})
    remembered = Remembered(Placement(layout, (CPU,)), config)

    class Fixed:
        code_shift = 0

        def __init__(self, *values: float) -> None:
            self.values = torch.tensor(values)

        def read(self, segment: Any, start: int, stop: int) -> Tensor:
            return self.values[start:stop]

    remembered.keep("a", Fixed(1, 0, 2, 0, 0), step=0)
    remembered.keep("b", Fixed(0, 7, 0, 0, 0), step=1)
    remembered.keep("a", Fixed(0, 3, 1, 0, 4), step=2)
    assert list(remembered.tasks) == ["a", "b"]
    segment = layout.segments[0]
    assert remembered.tasks["a"].read(segment, 0, 5).tolist() == [1, 3, 2, 0, 4]
    assert remembered.tasks["b"].read(segment, 0, 5).tolist() == [0, 7, 0, 0, 0]
    for name in (None, ""):
        with pytest.raises(UserError, match=r"finish_stage\(name\)"):
            remembered.keep(name, Fixed(0, 0, 0, 0, 0), step=3)


def test_shares_of_nothing() -> None:
    shares = task_shares(["a", None], torch.tensor([[0, 0], [0, 4]]))
    assert [share.jaccard for share in shares] == [(None, 0.0), (0.0, 1.0)]
