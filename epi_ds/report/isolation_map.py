"""The figure of an inspection: which layers and matrices hold what is isolated, and how importance is spread."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_text
from epi_ds.report.figures import svg_of

FORMATS = (".png", ".svg")


class IsolationMap(NamedTuple):
    """What is drawn."""

    title: str
    layers: Sequence[str]
    kinds: Sequence[str]
    shares: Sequence[Sequence[float | None]]
    """Isolated share of every layer's entries of every kind; None where it has none."""
    floors: Sequence[float]
    """Where each bin of the histogram begins; empty where importance is unknown."""
    entries: Sequence[int]
    isolated: Sequence[int]


def isolation_figure(content: IsolationMap) -> Figure:
    """Return a heat map of isolated shares, and beneath it the histogram of importance where it is known."""
    # A thousand layers, one for each tensor, would be more pixels than a picture may have.
    height = min(60.0, 1.4 + 0.24 * len(content.layers))
    parts = [height, 2.8] if content.floors else [height]
    figure = Figure(figsize=(8, sum(parts)), layout="constrained")
    axes = figure.subplots(len(parts), squeeze=False, height_ratios=parts)[:, 0]
    _draw_map(figure, axes[0], content)
    if content.floors:
        _draw_histogram(axes[1], content)
    return figure


def _draw_map(figure: Figure, axes: Axes, content: IsolationMap) -> None:
    shares = [[math.nan if share is None else share for share in row] for row in content.shares]
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(content.layers)), content.layers, fontsize=7)
    axes.set_xticks(range(len(content.kinds)), content.kinds, fontsize=8)
    axes.set_title(content.title, fontsize=9)
    figure.colorbar(image, ax=axes, label="isolated share")


def _draw_histogram(axes: Axes, content: IsolationMap) -> None:
    edges = [*content.floors, 2 * content.floors[-1]]
    axes.stairs(content.entries, edges, label="all", color="0.6", fill=True)
    axes.stairs(content.isolated, edges, label="isolated", color="C0", fill=True)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("importance")
    axes.set_ylabel("entries")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its name. Raises DiskError where it cannot be written."""
    with writing(path):
        if path.suffix == ".svg":
            write_text(path, svg_of(figure))
        else:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
            path.write_bytes(buffer.getvalue())
