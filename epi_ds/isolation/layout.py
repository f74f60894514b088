"""Which parameters are covered, which layer each belongs to, and where this rank's share of it lies.

[Note: padding] ZeRO-3 cuts every parameter into equal slices, the last of which may end in padding. Zeros are real
importances elsewhere, so padding is removed by length (`Segment.real_numel`), never by value.

[Note: layers] A layer is the unit of a normaliser and of a threshold, not a module: with ``block`` it is the outermost
numbered entry in a parameter's name, so one transformer block is one layer, and a vision tower's blocks are layers
apart from the language model's, because their names differ before the number.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from epi_ds.errors import UserError


class Parameter(NamedTuple):
    """A trainable parameter as every rank sees it."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries of the whole parameter."""
        return math.prod(self.shape)


class Segment(NamedTuple):
    """This rank's slice of one covered parameter, inside the flat partition of a sub-group."""

    name: str
    layer: int
    """Index into `Layout.layer_names`."""
    sub_group: int
    start: int
    """Offset in the sub-group's flat partition, in entries."""
    real_numel: int
    """Entries without padding; 0 where the rank holds none of the parameter. See [Note: padding]."""
    partition_numel: int
    """Entries with padding, the same on every rank."""
    global_start: int
    """Index of the slice's first entry in the flattened parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""

    @property
    def stop(self) -> int:
        """Offset one past the last real entry."""
        return self.start + self.real_numel

    @property
    def numel(self) -> int:
        """Entries of the whole parameter."""
        return math.prod(self.shape)

    @property
    def whole(self) -> Segment:
        """All of the parameter as one segment, of a layout of its own."""
        numel = self.numel
        return self._replace(layer=0, sub_group=0, start=0, real_numel=numel, partition_numel=numel, global_start=0)


class Span(NamedTuple):
    """A run of entries ``[start, stop)`` of a flat partition."""

    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The geometry of one rank: every covered segment, in sub-group order and then by offset."""

    segments: tuple[Segment, ...]
    layer_names: tuple[str, ...]
    sub_group_numel: tuple[int, ...]
    """Entries of each flat partition, padding and uncovered parameters included."""

    @cached_property
    def by_name(self) -> dict[str, Segment]:
        """Segments by parameter name."""
        return {segment.name: segment for segment in self.segments}

    @cached_property
    def by_sub_group(self) -> tuple[tuple[Segment, ...], ...]:
        """Segments of each sub-group, by offset."""
        groups: list[list[Segment]] = [[] for _ in self.sub_group_numel]
        for segment in self.segments:
            groups[segment.sub_group].append(segment)
        return tuple(tuple(group) for group in groups)

    @cached_property
    def layer_numel(self) -> tuple[int, ...]:
        """Entries of each layer over all ranks."""
        totals = [0] * len(self.layer_names)
        for segment in self.segments:
            totals[segment.layer] += segment.numel
        return tuple(totals)

    @cached_property
    def kind_names(self) -> tuple[str, ...]:
        """Kinds of matrices, in the order in which they first appear. See `kind_of`."""
        return tuple(dict.fromkeys(kind_of(segment.name) for segment in self.segments))

    @cached_property
    def group_numel(self) -> tuple[int, ...]:
        """Entries of each layer and then of each kind, over all ranks."""
        kinds = dict.fromkeys(self.kind_names, 0)
        for segment in self.segments:
            kinds[kind_of(segment.name)] += segment.numel
        return (*self.layer_numel, *kinds.values())

    @cached_property
    def groups_of(self) -> dict[str, tuple[int, int]]:
        """Where each parameter counts in `group_numel`: its layer and its kind."""
        kinds = {kind: len(self.layer_names) + index for index, kind in enumerate(self.kind_names)}
        return {segment.name: (segment.layer, kinds[kind_of(segment.name)]) for segment in self.segments}

    @property
    def covered_numel(self) -> int:
        """Covered entries over all ranks."""
        return sum(self.layer_numel)


def parts_within(segments: Sequence[Segment], start: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
    """Yield (segment, first, last) for the parts of ``segments`` that lie in ``[start, stop)`` of their partition.

    ``segments`` must be in ascending order.
    """
    before = bisect_right(segments, start, key=attrgetter("start"))
    for segment in islice(segments, max(before - 1, 0), None):
        if segment.start >= stop:
            return
        first, last = max(segment.start, start), min(segment.stop, stop)
        if first < last:
            yield segment, first, last


def merge_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Join neighbouring spans and drop empty ones. ``spans`` must be in ascending order."""
    merged: list[Span] = []
    for span in spans:
        if span.start == span.stop:
            continue
        if merged and merged[-1].stop == span.start:
            merged[-1] = Span(merged[-1].start, span.stop)
        else:
            merged.append(span)
    return tuple(merged)


def select_covered(names: Sequence[str], *, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the names that ``include`` matches (all when empty) and ``exclude`` does not, in their order.

    Raises ValueError for a pattern that is not a regular expression or matches no name, and when nothing is left.
    """
    included = _match(names, include, field="include") if include else set(names)
    covered_names = included - _match(names, exclude, field="exclude")
    if not covered_names:
        raise UserError(
            f"include={list(include)} and exclude={list(exclude)} leave none of the {len(names)} trainable parameters "
            "covered, so nothing would ever be isolated; relax one of them"
        )
    return [name for name in names if name in covered_names]


def _match(names: Sequence[str], patterns: Sequence[str], *, field: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        regex = _compile(pattern, field=field)
        hits = {name for name in names if regex.search(name)}
        if not hits:
            raise UserError(
                f"{field}: the pattern {pattern!r} matches none of the {len(names)} trainable parameters "
                f"({_some(names)}); correct or remove it"
            )
        matched |= hits
    return matched


def _compile(pattern: str, *, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def block_of(name: str) -> str:
    """Return the layer of a parameter under ``layer: block``. See [Note: layers].

    Parameters outside numbered blocks (embeddings, head, final norm) form one layer per module.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        # The number of a parameter that is a list entry itself counts too: a list of large weights is a list of layers.
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def kind_of(name: str) -> str:
    """Return what a parameter is in every block: its name after the block's number, further numbers left open.

    The same for all query projections of a model, or for the same matrix of all experts; of a parameter outside
    numbered blocks its whole name.
    """
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    inside = parts[numbers[0] + 1 :] if numbers else parts
    return ".".join("*" if part.isdigit() else part for part in inside) or name


def assign_layers(names: Sequence[str], layer: str | Mapping[str, str]) -> list[str]:
    """Return the layer name of every parameter: ``block``, ``tensor``, or groups of regular expressions by name.

    Raises ValueError for a group that matches nothing, or a parameter that matches no group or several.
    """
    if layer == "block":
        return [block_of(name) for name in names]
    if layer == "tensor":
        return list(names)
    if isinstance(layer, str):
        raise UserError(f"layer must be 'block', 'tensor' or a mapping of groups, got {layer!r}")
    groups = {group: _match(names, [pattern], field=f"layer group {group!r}") for group, pattern in layer.items()}
    assigned = []
    for name in names:
        hits = [group for group, members in groups.items() if name in members]
        if len(hits) != 1:
            found = f"the groups {', '.join(hits)}" if hits else "no group"
            raise UserError(
                f"layer: the parameter {name} matches {found}, but every covered parameter must match exactly one; "
                "narrow the patterns, add a group for the rest, or exclude the parameter"
            )
        assigned.append(hits[0])
    return assigned


def build_layout(
    sub_groups: Sequence[Sequence[Parameter]],
    *,
    rank: int,
    world_size: int,
    layer: str | Mapping[str, str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Layout:
    """Build the layout of ``rank`` from the parameters of every sub-group, in ZeRO-3's order.

    A sub-group's flat partition holds, parameter after parameter, slices of ``ceil(numel / world_size)`` entries.
    """
    names = [parameter.name for group in sub_groups for parameter in group]
    covered = select_covered(names, include=include, exclude=exclude)
    layer_by_name = dict(zip(covered, assign_layers(covered, layer), strict=True))
    layer_names = tuple(dict.fromkeys(layer_by_name.values()))
    layer_index = {name: index for index, name in enumerate(layer_names)}

    segments: list[Segment] = []
    sub_group_numel: list[int] = []
    for sub_group, parameters in enumerate(sub_groups):
        start = 0
        for parameter in parameters:
            partition_numel = -(-parameter.numel // world_size)
            global_start = rank * partition_numel
            if parameter.name in layer_by_name:
                segments.append(
                    Segment(
                        name=parameter.name,
                        layer=layer_index[layer_by_name[parameter.name]],
                        sub_group=sub_group,
                        start=start,
                        real_numel=max(0, min(partition_numel, parameter.numel - global_start)),
                        partition_numel=partition_numel,
                        global_start=global_start,
                        shape=parameter.shape,
                    )
                )
            start += partition_numel
        sub_group_numel.append(start)
    return Layout(tuple(segments), layer_names, tuple(sub_group_numel))
