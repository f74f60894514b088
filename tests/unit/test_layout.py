from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epi_ds.isolation.layout import (
    Parameter,
    Span,
    assign_layers,
    block_of,
    build_layout,
    merge_spans,
    parts_within,
)

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.q.weight",
    "model.layers.0.q.bias",
    "model.layers.11.mlp.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_blocks_are_the_outermost_numbered_entry() -> None:
    assert assign_layers(NAMES, "block") == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.0",
        "model.layers.11",
        "model.norm",
        "lm_head",
    ]
    assert block_of("vision_tower.encoder.layers.3.mlp.experts.7.weight") == "vision_tower.encoder.layers.3"
    assert block_of("language_model.layers.3.mlp.weight") == "language_model.layers.3"
    assert block_of("0.weight") == "0"
    assert block_of("weights.3") == "weights.3"
    assert block_of("weight") == "weight"


def test_layers_by_tensor_and_by_group() -> None:
    assert assign_layers(NAMES, "tensor") == NAMES
    groups = {"body": r"layers\.", "rest": r"embed|norm|head"}
    assert assign_layers(NAMES, groups) == ["rest", "body", "body", "body", "rest", "rest"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"body": r"layers\."}, "model.embed_tokens.weight matches no group"),
        ({"all": ".", "body": r"layers\."}, "model.layers.0.q.weight matches the groups all, body"),
        ({"all": ".", "none": "decoder"}, "layer group 'none': the pattern 'decoder' matches none"),
        ({"all": "("}, "is not a regular expression"),
    ],
)
def test_groups_must_share_the_parameters_out(groups: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match="layer") as raised:
        assign_layers(NAMES, groups)
    assert message in str(raised.value)


@given(
    st.lists(
        st.lists(
            st.integers(1, 3).flatmap(lambda d: st.lists(st.integers(0, 7), min_size=d, max_size=d)),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 5),
)
def test_the_ranks_cover_every_entry_exactly_once(shapes: list[list[list[int]]], world_size: int) -> None:
    groups = [
        [Parameter(f"p{i}_{j}.weight", tuple(shape)) for j, shape in enumerate(group)] for i, group in enumerate(shapes)
    ]
    layouts = [build_layout(groups, rank=rank, world_size=world_size, layer="tensor") for rank in range(world_size)]
    for group in groups:
        for parameter in group:
            seen = []
            for layout in layouts:
                segment = layout.by_name[parameter.name]
                assert segment.real_numel <= segment.partition_numel
                assert segment.start + segment.partition_numel <= layout.sub_group_numel[segment.sub_group]
                seen += range(segment.global_start, segment.global_start + segment.real_numel)
            assert seen == list(range(parameter.numel))
    assert sum(segment.real_numel for layout in layouts for segment in layout.segments) == layouts[0].covered_numel


def test_segments_of_a_sub_group_do_not_overlap_and_skip_padding() -> None:
    group = [Parameter("a.weight", (5,)), Parameter("b.weight", (1,)), Parameter("c.weight", (4,))]
    layout = build_layout([group], rank=1, world_size=2, layer="tensor", exclude=["^b"])
    a, c = layout.segments
    assert (a.start, a.real_numel, a.global_start) == (0, 2, 3)
    assert (c.start, c.real_numel, c.global_start) == (4, 2, 2)
    assert layout.sub_group_numel == (6,)


def test_coverage_must_leave_something() -> None:
    group = [[Parameter("a.weight", (5,))]]
    with pytest.raises(ValueError, match="include: the pattern 'b' matches none of the 1"):
        build_layout(group, rank=0, world_size=1, layer="block", include=["b"])
    with pytest.raises(ValueError, match="nothing would ever be isolated"):
        build_layout(group, rank=0, world_size=1, layer="block", exclude=["a"])


def test_spans_merge_where_they_touch() -> None:
    spans = [Span(0, 3), Span(3, 3), Span(3, 5), Span(6, 8)]
    assert merge_spans(spans) == (Span(0, 5), Span(6, 8))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 60),
    st.integers(0, 30),
)
def test_parts_are_those_of_every_segment(sizes: list[int], world_size: int, start: int, length: int) -> None:
    """Segments without an entry on a rank, padding between them, and ranges beyond the last are no exceptions."""
    parameters = [Parameter(f"{index}.w", (size,)) for index, size in enumerate(sizes)]
    for rank in range(world_size):
        layout = build_layout([parameters], rank=rank, world_size=world_size, layer="tensor")
        expected = [
            (segment, max(segment.start, start), min(segment.stop, start + length))
            for segment in layout.segments
            if max(segment.start, start) < min(segment.stop, start + length)
        ]
        assert list(parts_within(layout.by_sub_group[0], start, start + length)) == expected
