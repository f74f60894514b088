"""The groups in which covered entries are counted: layers, kinds of matrices, heads of attention, and all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from epi_ds.inspect.distances import Distance, DistanceTally
from epi_ds.inspect.heads import Head
from epi_ds.inspect.matrix_kinds import MatrixKind
from epi_ds.inspect.tally import Spread, Tally


class Group(NamedTuple):
    """A layer, a kind of matrix, or all covered entries."""

    name: str
    entries: int
    isolated: int
    threshold: float | None
    """Of a layer: entries at or above it were isolated by the last refresh, none at inf. None where that is not known
    and for what is no layer. See `Facts.thresholds_are_importance`."""
    importance: Spread | None
    """None where it is unknown."""
    distance: Distance | None
    """None where it is unknown."""

    @property
    def share(self) -> float:
        """Isolated share of the entries."""
        return self.isolated / self.entries if self.entries else 0.0


class Cell(NamedTuple):
    """What one layer has of one kind of matrix, in entries."""

    layer: str
    kind: MatrixKind
    entries: int
    isolated: int


class Projection(NamedTuple):
    """A projection of an attention, by head."""

    parameter: str
    layer: str
    kind: MatrixKind
    heads: tuple[Head, ...]


class Counts:
    """What is counted of a group while it is read."""

    def __init__(self) -> None:
        self.entries, self.distance = Tally(), DistanceTally()

    def add(self, other: Counts) -> None:
        """Take in another group."""
        self.entries.add(other.entries)
        self.distance.add(other.distance)

    def group(self, name: str, *, threshold: float | None = None) -> Group:
        """Return what was counted."""
        entries, distance = self.entries, self.distance.distance
        return Group(name, entries.entries, entries.isolated, threshold, entries.spread, distance)


class Grouping:
    """Adds parameters up to groups, one layer after another."""

    def __init__(self, thresholds: Mapping[str, float]) -> None:
        """``thresholds`` are those of layers, by name; empty where there are none yet."""
        self._thresholds = thresholds
        self._whole, self._layer = Counts(), Counts()
        self._kinds: dict[MatrixKind, Counts] = defaultdict(Counts)
        # Entries and isolated ones of the layer at hand.
        self._cells: dict[MatrixKind, tuple[int, int]] = {}
        self.layers: list[Group] = []
        self.cells: list[Cell] = []
        """By layer and kind; those without entries are left out."""

    def add(self, kind: MatrixKind, parameter: Counts) -> None:
        """Take in a parameter of the layer at hand."""
        for group in (self._whole, self._layer, self._kinds[kind]):
            group.add(parameter)
        entries, isolated = self._cells.get(kind, (0, 0))
        self._cells[kind] = entries + parameter.entries.entries, isolated + parameter.entries.isolated

    def end_layer(self, name: str) -> None:
        """Finish the layer at hand."""
        self.layers.append(self._layer.group(name, threshold=self._thresholds.get(name)))
        self.cells += [Cell(name, kind, *self._cells[kind]) for kind in MatrixKind if kind in self._cells]
        self._layer, self._cells = Counts(), {}

    @property
    def whole(self) -> Group:
        """All parameters."""
        return self._whole.group("all")

    @property
    def kinds(self) -> tuple[Group, ...]:
        """By kind, in the order of a model."""
        return tuple(self._kinds[kind].group(kind) for kind in MatrixKind if kind in self._kinds)
