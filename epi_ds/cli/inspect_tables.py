"""What ``epi-ds inspect`` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from epi_ds.inspect.groups import Group, Projection
from epi_ds.inspect.histogram import axis_of, bar, sparkline
from epi_ds.inspect.inspection import Inspection
from epi_ds.inspect.matrix_kinds import MatrixKind
from epi_ds.inspect.tally import Place, Spread

# More than any table has, so that none is cut off: names are to be copied from here.
_WIDTH = 1000
_ROWS, _COLUMNS, _BAR = 16, 48, 40


def show(found: Inspection, console: Console) -> None:
    """Print an inspection for people."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    for line in _facts(found):
        say(line)
    tables = Console(width=_WIDTH, highlight=False, file=console.file)
    for table in (_groups("layer", found.layers), _groups("kind", found.kinds)):
        tables.print(table)
    if found.other_kinds:
        say(f"other: {', '.join(found.other_kinds)}")
    if found.whole.importance is not None:
        tables.print(_histogram(found.whole.importance))
        tables.print(_histograms(found.layers, found.whole.importance))
    if found.projections:
        tables.print(_heads(found.projections))
    if found.whole.distance is not None:
        say(f"distance from {found.origin}:")
        tables.print(_distances("layer", (*found.layers, found.whole)))
        tables.print(_distances("kind", found.kinds))
    if found.without_origin:
        say(f"not there, so of unknown distance: {', '.join(found.without_origin)}")
    for what, reason in found.unknown.items():
        say(f"{what} unknown: {reason}")


def _facts(found: Inspection) -> Iterator[str]:
    facts, settings, whole = found.facts, found.facts.settings, found.whole
    yield f"checkpoint  {found.checkpoint}"
    for line in found.passed_over:
        yield f"passed over {line}"
    stage = "of an unknown stage" if facts.stage is None else f"of stage {facts.stage}"
    yield (
        f"step        {facts.step} {stage}, saved {facts.saved_at or 'at an unknown time'}; {facts.applied_steps} "
        f"applied, {facts.active_steps} of them under a mask"
    )
    optimizer = facts.optimizer or "an optimizer that an earlier release did not name"
    yield f"ranks       {facts.world_size}, {facts.batch_rows} rows a step, {facts.model_dtype}, {optimizer}"
    yield (
        f"method      policy {settings['policy']}, selection {settings['selection']}{_normalizer(settings)}, layer "
        f"{settings['layer']}, apply {settings['apply']}, state {settings['state']}, memory {settings['memory']}"
    )
    yield (
        f"isolated    {whole.isolated:,} of {whole.entries:,} covered entries, {whole.share:.3%}; asked for "
        f"{_ratio(settings['ratio'])}"
    )
    yield f"refreshes   {facts.refreshes} (interval {settings['refresh_interval']}), {facts.observations} observations"
    if not facts.thresholds_are_importance and facts.refreshes:
        yield (
            "thresholds  of what the last refresh compared, which policy, memory or hysteresis made of importance: "
            "not to be compared with it"
        )
    yield f"anchor      {found.anchor}"
    if not found.remembered:
        yield "remembered  no finished stage"
    for state in found.remembered:
        yield f"remembered  {state.name}: {_spread_sentence(state.importance, state.entries)}"


def _normalizer(settings: dict[str, object]) -> str:
    return f" ({settings['normalizer']})" if settings["selection"] == "normalized_global" else ""


def _ratio(ratio: object) -> str:
    if isinstance(ratio, dict):
        return f"{ratio['start']:.2%} to {ratio['end']:.2%} in {ratio['steps']} steps ({ratio['schedule']})"
    return f"{ratio:.2%}" if isinstance(ratio, float) else str(ratio)


def _spread_sentence(spread: Spread, entries: int) -> str:
    mean = spread.total / entries
    return f"mean {mean:.2e}, median {spread.median:.2e}, largest {spread.largest:.2e} in {_place(spread.largest_at)}"


def _place(place: Place) -> str:
    return f"{place.parameter}[{', '.join(map(str, place.at))}]"


def _table(*columns: str, left: int = 1) -> Table:
    """Return a table of which the first columns are text, and the others numbers."""
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "none" if math.isinf(value) else f"{value:.2e}"


def _groups(what: str, groups: Sequence[Group]) -> Table:
    """Isolated shares and importance, of layers with their thresholds."""
    has_thresholds = what == "layer"
    columns = [what, "entries", "isolated", "share", *["threshold"] * has_thresholds]
    table = _table(*columns, "smallest", "median", "largest", "of all importance", "largest in")
    table.columns[-1].justify = "left"
    total = math.fsum(group.importance.total for group in groups if group.importance is not None)
    for group in groups:
        spread = group.importance
        row = [group.name, f"{group.entries:,}", f"{group.isolated:,}", f"{group.share:.2%}"]
        row += [_number(group.threshold)] * has_thresholds
        if spread is None:
            row += ["-"] * 5
        else:
            row += [_number(value) for value in (spread.smallest, spread.median, spread.largest)]
            row += [f"{spread.total / total:.2%}" if total else "-", _place(spread.largest_at)]
        table.add_row(*map(Text, row))
    return table


def _histogram(spread: Spread) -> Table:
    """How many entries are how important."""
    table = _table("importance from", "entries", "isolated", "")
    table.columns[-1].justify = "left"
    axis = axis_of(spread.octaves, at_most=_ROWS)
    counts = axis.counts(spread.octaves)
    largest = max((entries for entries, _ in counts), default=0)
    if spread.zeros:
        table.add_row("zero", f"{spread.zeros:,}", "", "")
    for floor, (entries, isolated) in zip(axis.floors, counts, strict=True):
        table.add_row(f"{floor:.1e}", f"{entries:,}", f"{isolated:,}", bar(entries, largest=largest, width=_BAR))
    return table


def _histograms(layers: Sequence[Group], whole: Spread) -> Table:
    """The same of every layer, on one axis."""
    axis = axis_of(whole.octaves, at_most=_COLUMNS)
    ends = (axis.floors[0], axis.floors[-1]) if axis.bins else (0.0, 0.0)
    table = Table("layer", f"importance, {ends[0]:.0e} to {ends[1]:.0e}")
    for layer in layers:
        if layer.importance is not None:
            entries = [entries for entries, _ in axis.counts(layer.importance.octaves)]
            table.add_row(Text(layer.name), sparkline(entries))
    return table


def _heads(projections: Sequence[Projection]) -> Table:
    """Isolated share by head: of every projection the least and the most, and which head that is."""
    kinds = list(dict.fromkeys(projection.kind for projection in projections))
    table = _table("isolated by head in", *(f"{kind}: least, most (head)" for kind in kinds))
    attentions: dict[str, dict[MatrixKind, str]] = {}
    for projection in projections:
        module, _, ending = projection.parameter.rsplit(".", 2)
        shares = [head.isolated / head.entries for head in projection.heads]
        most = max(shares)
        # A bias has a hundredth of the entries.
        if ending == "weight":
            shown = f"{min(shares):.2%}, {most:.2%} ({shares.index(most)})"
            attentions.setdefault(module, {})[projection.kind] = shown
    for module, cells in attentions.items():
        table.add_row(*map(Text, [module, *(cells.get(kind, "-") for kind in kinds)]))
    return table


def _distances(what: str, groups: Sequence[Group]) -> Table:
    table = _table(what, "moved", "relative", "rms", "rms of isolated", "largest", "largest in")
    table.columns[-1].justify = "left"
    for group in groups:
        if (distance := group.distance) is not None:
            row = [group.name, f"{distance.moved / distance.entries:.2%}", f"{distance.relative:.2e}"]
            row += [_number(value) for value in (distance.rms, distance.isolated_rms, distance.largest)]
            table.add_row(*map(Text, [*row, distance.largest_in]))
    return table
