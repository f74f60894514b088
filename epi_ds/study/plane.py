"""The plane of a study as SVG text: what every arm learnt against what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from epi_ds.report.figures import plane_axes, svg_of
from epi_ds.study.comparison import ArmRow
from epi_ds.study.models import Study

# Of the colours that matplotlib goes round in, all but the grey that plain fine-tuning has.
_COLOURS = tuple(f"C{number}" for number in range(10) if number != 7)
_MARKERS = ("s", "D", "^", "v", "P", "X")
# So many arms differ at a glance: 54.
_LOOKS = tuple((colour, marker) for marker in _MARKERS for colour in _COLOURS)


def plane_figure(study: Study, rows: Sequence[ArmRow]) -> str:
    """Return the plane: plain fine-tuning in grey, joined, and other arms that are drawn with intervals over seeds."""
    rows = [row for row in rows if study.drawn is None or row.arm in study.drawn]
    figure, axes = plane_axes(label="new task (accuracy)")
    plain = sorted((row.new.mean, row.kept.mean) for row in rows if row.arm in study.frontier and row.new and row.kept)
    axes.plot([new for new, _ in plain], [kept for _, kept in plain], color="0.7", linewidth=1, zorder=1)
    looks = cycle(_LOOKS)
    for row in rows:
        if row.new is None or row.kept is None:
            continue
        is_plain = row.arm in study.frontier
        colour, marker = ("0.5", "o") if is_plain else next(looks)
        axes.errorbar(
            row.new.mean,
            row.kept.mean,
            xerr=row.new.half_width,
            yerr=row.kept.half_width,
            marker=marker,
            color=colour,
            markersize=5,
            linewidth=0.8,
            linestyle="none",
            label="plain fine-tuning" if is_plain else row.arm,
        )
        if is_plain:
            axes.annotate(row.arm, (row.new.mean, row.kept.mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(
            unique.values(), unique.keys(), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
        )
    return svg_of(figure)
