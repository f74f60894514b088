"""``report.html``: one page without scripts or network, made from a run's metrics only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_text
from epi_ds.errors import UserError
from epi_ds.report import figures
from epi_ds.report.scores import ScoreTable, score_history, score_table
from epi_ds.report.words import interval_told, ratio_told

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; margin: 2rem auto; max-width: 56rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; } p { max-width: 42rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem 1.2rem; }
dt { color: #65676b; font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e4e6eb; }
th:first-child, td:first-child { text-align: left; } svg { width: 100%; height: auto; }
"""


def write_report(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write the page of a run from the lines of its metrics file; whole or as it was before.

    Raises UserError where no run ever started, and DiskError where it cannot be written.
    """
    runs = [line for line in metrics if line["event"] == "run"]
    if not runs:
        raise UserError(f"there is nothing to report: {path.parent} holds no metrics of a run")
    body = [
        f"<h1>{escape(title)}</h1>",
        _summary(metrics, runs),
        *_sections(metrics, runs[-1]["stages"]),
        *_own_rows(metrics),
        *_changes(runs),
    ]
    page = (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        "<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    with writing(path):
        write_text(path, page)


def _summary(metrics: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> str:
    run, steps = runs[-1], [line for line in metrics if line["event"] == "step"]
    config = run["config"]
    done = steps[-1]["step"] if steps else 0
    active = sum(line["isolated"] > 0 for line in steps)
    facts = {
        "steps": f"{done} of {run['total_steps']}",
        "ranks": str(run["world_size"]),
        "resumes": str(sum(line["resumed"] for line in runs)),
        "policy": config["policy"],
        "requested ratio": _over_time(runs, lambda config: ratio_told(config["ratio"])),
        "refresh interval": _over_time(runs, interval_told),
        "covered parameters": f"{run['covered']:,}",
        "mask active in": f"{active / max(1, len(steps)):.0%} of steps",
    }
    table = score_table(metrics)
    if table.kept_told is not None:
        facts["forgotten of what is kept"] = table.kept_told
    if table.mean_forgetting is not None:
        facts["mean forgetting"] = f"{table.mean_forgetting:.1%}"
    return "<dl>" + "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()) + "</dl>"


def _over_time(runs: Sequence[dict[str, Any]], said: Callable[[dict[str, Any]], str]) -> str:
    """Say a setting, and from which step on where a resume changed it."""
    parts: list[str] = []
    last = None
    for run in runs:
        now = said(run["config"])
        if now != last:
            parts.append(now if last is None else f"{now} from step {run['step'] + 1}")
        last = now
    return ", ".join(parts)


def _sections(metrics: Sequence[dict[str, Any]], stages: figures.Stages) -> list[str]:
    def lines(event: str) -> list[dict[str, Any]]:
        return [line for line in metrics if line["event"] == event]

    steps, refreshes, evaluations = lines("step"), lines("refresh"), lines("evaluation")
    sections = []
    if evaluations:
        sections.append(
            _section(
                "Scores",
                "Every task before training and after each stage. Forgetting: the best earlier score minus the last.",
                _score_rows(score_table(metrics)),
            )
        )
        if any(score["higher_is_better"] for line in evaluations for score in line["scores"].values()):
            sections.append(_section("Accuracy", "", figures.score_figure(evaluations, stages)))
        history = score_history(metrics)
        if len(history.columns) > len(score_table(metrics).columns):
            explanation = "Every task at every evaluation, those within stages too."
            sections.append(_section("Scores over time", explanation, _history_rows(history)))
    if steps:
        sections.append(_section("Loss", "", figures.loss_figure(steps, stages)))
        if len(figures.sources_of(steps)) > 1:
            explanation = "Mean over the tokens of each source; what is drawn from what is kept is called replayed."
            sections.append(_section("Loss by source", explanation, figures.source_loss_figure(steps, stages)))
        sections.append(
            _section("Isolated share", "Entries that did not move, per step.", figures.share_figure(steps, stages))
        )
    if refreshes:
        explanation = (
            "Overlap of each mask with the one before it: 1 keeps the same entries, and a dip after a stage begins "
            "shows that other parameters became important."
        )
        sections.append(_section("Drift", explanation, figures.drift_figure(refreshes, stages)))
        sections.append(
            _section(
                "Layers",
                "Isolated share of each layer at each refresh.",
                figures.layer_figure(refreshes, stages),
            )
        )
    return sections


def _own_rows(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """What is known of the rows that the model wrote itself, or of those that a person put in their place."""
    line = next((line for line in metrics if line["event"] == "own_rows"), None)
    if line is None:
        return []
    facts = {"rows": f"{line['written']:,}"}
    if not line["is_edited"]:
        facts["rows"] += f" of {line['asked']:,}"
        left_out = ", ".join(f"{count} {reason}" for reason, count in line["left_out"].items() if count)
        facts["left out"] = left_out or "none"
        facts["sampled tokens"] = f"{line['num_tokens']:,}"
        rate = line["tokens_per_second"]
        facts["time"] = f"{line['seconds']:,.1f} s" + ("" if rate is None else f", {rate:,.0f} tokens/s")
    facts |= {"file": line["file"], "sha256": line["sha256"]}
    rows = "".join(f"<tr><td>{name}</td><td>{escape(fact)}</td></tr>" for name, fact in facts.items())
    whose = "Given or edited by a person" if line["is_edited"] else "Written by the model itself before the first step"
    return [_section("Own rows", f"{whose}, to be kept.", f"<table><tbody>{rows}</tbody></table>")]


def _changes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that resumes changed, in their order."""
    cells = [
        (f"{run['step'] + 1}", change["key"], str(change["before"]), str(change["now"]))
        for run in runs
        for change in run.get("changed", ())
    ]
    if not cells:
        return []
    header = "".join(f"<th>{name}</th>" for name in ("from step", "setting", "was", "is"))
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
    return [
        _section("Changed settings", "What a resume of this run was told otherwise than the start before it.", table)
    ]


def _section(title: str, explanation: str, content: str) -> str:
    text = f"<p>{explanation}</p>" if explanation else ""
    return f"<section><h2>{title}</h2>{text}{content}</section>"


def _shown(value: float | None, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if percent else f"{value:.3f}"


def _history_rows(table: ScoreTable) -> str:
    """Evaluations below each other: there may be many."""
    header = "".join(f"<th>{escape(name)}</th>" for name in ("evaluation", *(row.name for row in table.rows)))
    rows = "".join(
        f"<tr><td>{escape(column)}</td>"
        + "".join(f"<td>{_shown(row.values[index], row.higher_is_better)}</td>" for row in table.rows)
        + "</tr>"
        for index, column in enumerate(table.columns)
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"


def _score_rows(table: ScoreTable) -> str:
    header = "".join(f"<th>{escape(column)}</th>" for column in ("task", *table.columns, "forgetting"))
    rows = "".join(
        "<tr><td>"
        + escape(row.name)
        + "</td>"
        + "".join(f"<td>{_shown(value, row.higher_is_better)}</td>" for value in (*row.values, row.forgetting))
        + "</tr>"
        for row in table.rows
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
