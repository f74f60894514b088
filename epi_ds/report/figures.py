"""The figures of a report, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stage name -> [first step, stop step), as the run wrote it.
Stages = Mapping[str, Sequence[int]]


def _number(value: float | None) -> float:
    """Return a number to draw: a gap where it was not finite, which the metrics have as null."""
    return math.nan if value is None else value


def _figure(stages: Stages, *, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    for name, (first, stop) in stages.items():
        axes.axvline(first, color="0.85", linewidth=1)
        axes.text((first + stop) / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plane_axes(*, label: str) -> tuple[Figure, Axes]:
    """Return an empty plane of what was learnt, as ``label`` says it, against what was kept."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("kept (mean accuracy of what the base could)")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG text."""
    buffer = io.StringIO()
    # No date and no random ids: the same run gives the same page.
    with rc_context({"svg.hashsalt": "epi_ds"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_figure(steps: Sequence[Mapping[str, Any]], stages: Stages) -> str:
    """Training loss by step."""
    figure, axes = _figure(stages, label="training loss")
    axes.plot([s["step"] for s in steps], [_number(s["loss"]) for s in steps], linewidth=1)
    return svg_of(figure)


def sources_of(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the sources whose losses the steps have, in the order of their first; earlier releases wrote none."""
    return list(dict.fromkeys(name for step in steps for name in step.get("source_losses", {})))


def source_loss_figure(steps: Sequence[Mapping[str, Any]], stages: Stages) -> str:
    """Training loss of every source by step, where it had tokens."""
    figure, axes = _figure(stages, label="training loss")
    for name in sources_of(steps):
        points = [(s["step"], s["source_losses"][name]) for s in steps if name in s.get("source_losses", {})]
        axes.plot([step for step, _ in points], [_number(loss) for _, loss in points], linewidth=1, label=name)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return svg_of(figure)


def score_figure(evaluations: Sequence[Mapping[str, Any]], stages: Stages) -> str:
    """Accuracy of every task at the evaluations."""
    figure, axes = _figure(stages, label="accuracy")
    names = dict.fromkeys(name for line in evaluations for name in line["scores"])
    for name in names:
        points = [(line["step"], line["scores"][name]) for line in evaluations if name in line["scores"]]
        if all(score["higher_is_better"] for _, score in points):
            axes.plot(
                [step for step, _ in points], [_number(score["value"]) for _, score in points], marker="o", label=name
            )
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return svg_of(figure)


def share_figure(steps: Sequence[Mapping[str, Any]], stages: Stages) -> str:
    """Isolated share of the covered parameters in every step."""
    figure, axes = _figure(stages, label="isolated share")
    axes.step([s["step"] for s in steps], [s["isolated_share"] for s in steps], where="mid", linewidth=1)
    axes.set_ylim(bottom=0)
    return svg_of(figure)


def drift_figure(refreshes: Sequence[Mapping[str, Any]], stages: Stages) -> str:
    """Overlap of every mask with the one before it."""
    figure, axes = _figure(stages, label="overlap (Jaccard)")
    points = [(r["step"], r["jaccard"]) for r in refreshes if r["jaccard"] is not None]
    axes.plot([step for step, _ in points], [value for _, value in points], marker="o", linewidth=1)
    axes.set_ylim(0, 1.02)
    return svg_of(figure)


def layer_figure(refreshes: Sequence[Mapping[str, Any]], stages: Stages) -> str:
    """Isolated share of every layer at every refresh."""
    layers = list(refreshes[0]["layer_numel"])
    figure = Figure(figsize=(8, 0.9 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    shares = [[r["layer_isolated"][name] / r["layer_numel"][name] for r in refreshes] for name in layers]
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    shown = range(0, len(refreshes), max(1, len(refreshes) // 12))
    axes.set_xticks(list(shown), [str(refreshes[i]["step"]) for i in shown], fontsize=8)
    axes.set_xlabel("refresh after step")
    figure.colorbar(image, ax=axes, label="isolated share")
    return svg_of(figure)
