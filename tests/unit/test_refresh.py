"""What a refresh reports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from epi_ds.isolation.first_mask import FirstMask
from epi_ds.isolation.layout import Parameter, build_layout, kind_of
from epi_ds.isolation.refresh_report import GroupCounts, RefreshReport, layer_importance
from epi_ds.isolation.search.sketch import Extremes
from epi_ds.kernels import pack_bits

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.3.self_attn.q_proj.bias", "self_attn.q_proj.bias"),
        ("model.layers.11.mlp.experts.7.w1.weight", "mlp.experts.*.w1"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("weights.0", "weights.0"),
        ("scale", "scale"),
    ],
)
def test_a_kind_is_the_same_matrix_of_every_block(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_groups_count_every_entry_once_by_layer_and_once_by_kind() -> None:
    parameters = [
        Parameter("embed.weight", (7, 3)),
        *(Parameter(f"h.{i}.{matrix}.weight", (5, 2 + i)) for i in range(3) for matrix in ("up", "down")),
    ]
    layout = build_layout([parameters], rank=1, world_size=2, layer="block")
    assert layout.kind_names == ("embed", "up", "down")
    assert layout.layer_names == ("embed", "h.0", "h.1", "h.2")
    assert layout.group_numel == (21, 20, 30, 40, 21, 45, 45)
    assert layout.groups_of["h.1.down.weight"] == (2, 6)


def refresh(layers: tuple[GroupCounts, ...]) -> RefreshReport:
    isolated = sum(layer.isolated for layer in layers)
    return RefreshReport(
        step=1,
        ratio=0.1,
        budget=50,
        isolated=isolated,
        covered=400,
        tied_mass=1,
        layers=layers,
        kinds=(),
        importance=(),
        tasks=(),
        jaccard_first=None,
        held_gradient_energy=None,
        held_step_energy=None,
        seconds=0.0,
        collectives=4,
        sent_bytes=0,
    )


def test_shares_of_what_changed() -> None:
    one, other = GroupCounts("a", 200, 20, kept=15, before=30), GroupCounts("b", 200, 10, kept=0, before=0)
    assert (one.achieved_ratio, one.flip_rate, other.flip_rate) == (0.1, 0.5, None)
    found = refresh((one, other))
    assert found.achieved_ratio == 30 / 400
    # 15 in both; 30 before and 30 now.
    assert found.jaccard == 15 / 45
    assert refresh((other,)).jaccard is None
    assert GroupCounts("empty", 0, 0, 0, 0).achieved_ratio == 0


def test_importance_of_layers_names_the_holder_of_the_largest() -> None:
    codes = torch.tensor([0x3F800000, 0x7F800000, 0x7F800000])
    extremes = Extremes(torch.tensor([0x40000000, 5, -1]), torch.tensor([0, 3, -1]), torch.tensor([1, 0, -1]))
    found = layer_importance(codes, extremes, ("p", "q"))
    assert found[0] == (1.0, 0.0, 2.0, "q")
    assert found[1] == (math.inf, 3 * 2.0**-149, 5 * 2.0**-149, "p")
    assert found[2] == (math.inf, 0.0, 0.0, "")


def bits_of(mask: Tensor) -> Tensor:
    bits = torch.empty(-(-mask.numel() // 8), dtype=torch.uint8)
    pack_bits(mask, bits)
    return bits


def test_the_first_mask_is_sampled_once_and_compared_with() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [[torch.rand(numel, generator=generator) < 0.3 for numel in (5001, 0, 130)] for _ in range(3)]
    bits = [[bits_of(mask) for mask in each] for each in masks]
    first = FirstMask()
    assert first.compare(bits[0]).tolist() == [0, 0]
    first.keep(bits[0])
    first.keep(bits[1])
    sampled = [torch.arange(numel) // 8 % FirstMask.STRIDE == 0 for numel in (5001, 0, 130)]
    both = sum(int((a & b)[s].sum()) for a, b, s in zip(masks[0], masks[2], sampled, strict=True))
    either = sum(int((a | b)[s].sum()) for a, b, s in zip(masks[0], masks[2], sampled, strict=True))
    assert first.compare(bits[2]).tolist() == [both, either]
    assert first.compare(bits[0])[0] == first.compare(bits[0])[1] > 0
    assert sum(sample.numel() for sample in first.sample) < 5131 / 8 / 16 + 3
    again = FirstMask()
    again.restore(first.sample, [CPU] * 3)
    assert again.compare(bits[2]).tolist() == [both, either]
    again.restore([], [CPU] * 3)
    assert again.sample == []
