"""The model card of a run, made from its files only: what was trained and protected, what it scores, how to repeat it.

What is in it may be told to everybody: see published.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_text
from epi_ds.report.protection import protection_told
from epi_ds.report.published import is_secret, published, source_name, sources_in
from epi_ds.report.scores import score_table

FILE = "README.md"
"""What the hub shows of a repository."""
_RELEASES = ("epi-ds", "python", "torch", "deepspeed", "transformers", "trl", "accelerate", "datasets")
# What templates of libraries are left with where nobody filled them in.
_UNFILLED = ("[More Information Needed]", "[None](https://huggingface.co/None)")


class RunRecord(NamedTuple):
    """What a run left of itself."""

    name: str
    recipe: Mapping[str, Any]
    """As it was run, with all defaults."""
    given: Mapping[str, Any]
    """The settings of it that are no defaults."""
    metrics: Sequence[Mapping[str, Any]]
    """The lines of its metrics file."""

    @property
    def from_hub(self) -> Mapping[str, Any]:
        """What it took from the hub, as it noted it; empty where it noted nothing."""
        runs = self.lines("run")
        return runs[-1].get("from_hub", {}) if runs else {}

    def lines(self, event: str) -> list[Mapping[str, Any]]:
        """Return the lines of an event."""
        return [line for line in self.metrics if line["event"] == event]


class Card(NamedTuple):
    """A card on the disk."""

    path: Path
    is_new: bool
    """Whether it was written now."""


def write_card(record: RunRecord, folder: Path) -> Path:
    """Write the card of a run into the folder of its model; return the file. Raises DiskError where it cannot be."""
    path = folder / FILE
    with writing(path):
        write_text(path, card_of(record))
    return path


def ensure_card(record: RunRecord, folder: Path) -> Card:
    """Return the card in the folder of a model, which is written where there is none.

    What stands there is somebody's, but for a library's template that nobody filled in. Raises what `write_card` does.
    """
    path = folder / FILE
    if path.is_file() and not any(sign in path.read_text(encoding="utf-8") for sign in _UNFILLED):
        return Card(path, is_new=False)
    return Card(write_card(record, folder), is_new=True)


def card_of(record: RunRecord) -> str:
    """Return the card, in Markdown with the front matter that the hub reads. The same files make the same card."""
    parts = [
        f"# {_plain(record.name)}",
        _introduction(record),
        "## Training",
        _stages(record),
        *_changes(record),
        "## Protection",
        protection_told(record.recipe["method"], record.lines("summary")),
        "## Scores",
        *_scores(record),
        *_versions(record),
        "## Recipe",
        "`epi-ds train recipe.yaml` with this as `recipe.yaml`; settings that are not in it have their defaults. Of "
        "paths of the machine it ran on, names of files are left.",
        _fenced(yaml.safe_dump(published(record.given), sort_keys=False, allow_unicode=True, width=100), "yaml"),
    ]
    front = yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(record: RunRecord) -> dict[str, Any]:
    """Return what the hub files the model under. Nothing of it is guessed: a licence is the author's to choose."""
    lora = record.recipe["model"].get("lora")
    base, datasets = record.from_hub.get("model"), record.from_hub.get("datasets")
    return {
        **({} if base is None else {"base_model": base}),
        "library_name": "peft" if lora and not lora.get("merge", True) else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["epi_ds", "sft", "continual-learning", *(["lora"] if lora else [])],
        **({"datasets": list(datasets)} if datasets else {}),
    }


def _introduction(record: RunRecord) -> str:
    model, base = record.recipe["model"], record.from_hub.get("model")
    named = f"[{base}](https://huggingface.co/{base})"
    if base is None:
        named = f"`{str(published(model['path'])).replace('`', '')}`"
        # Of runs of earlier releases it is not known.
        named += ", a folder where it was trained," if record.from_hub else ""
    at = f" at revision `{model['revision']}`" if base is not None and model.get("revision") else ""
    how = " by a low-rank adapter" if model.get("lora") else ""
    return f"Fine-tuned from {named}{at}{how} with epi_ds on DeepSpeed ZeRO-3."


def _stages(record: RunRecord) -> str:
    runs = record.lines("run")
    rows, spans = (runs[-1].get("rows", {}), runs[-1]["stages"]) if runs else ({}, {})
    train = record.recipe["train"]
    lines = []
    for stage in record.recipe["stages"]:
        sources = sources_in(stage["data"])
        counts = rows.get(stage["name"], [None] * len(sources))
        told = [_source_told(one, count) for one, count in zip(sources, counts, strict=True)]
        first, stop = spans.get(stage["name"], (0, 0))
        rate = stage.get("learning_rate") or train.get("learning_rate")
        length = f"{stage['steps']} steps" if stage.get("steps") else str(stage.get("epochs", 1))
        told_rate = "default" if rate is None else f"{rate:g}"
        lines.append((stage["name"], "; ".join(told), length, stop - first or "-", told_rate))
    return _table(("stage", "rows", "epochs", "steps", "learning rate"), lines)


def _source_told(source: Mapping[str, Any], count: int | None) -> str:
    split = source.get("split", "train")
    subset = source.get("subset")
    parts = [source_name(source), *([subset] if subset else []), *([split] if split != "train" else [])]
    size = source.get("rows") if count is None else count
    return ", ".join(parts) + (f" ({size:,} rows)" if size is not None else "")


def _changes(record: RunRecord) -> Iterator[str]:
    """Yield what resumes were told otherwise: then the recipe below is not that of the whole run."""
    changed = [
        (run["step"] + 1, change["key"], published(change["before"]), published(change["now"]))
        for run in record.lines("run")
        for change in run.get("changed", ())
        if not is_secret(change["key"])
    ]
    if changed:
        yield "Settings that were changed while it ran:"
        yield _table(("from step", "setting", "was", "is"), changed)


def _scores(record: RunRecord) -> Iterator[str]:
    table = score_table(record.metrics)
    if not table.rows:
        yield "Nothing was evaluated in this run."
        return
    last = [line["scores"] for line in record.lines("evaluation")]
    rows = {name: score.get("num_rows", "-") for scores in last for name, score in scores.items()}
    lines = [
        (row.name, rows[row.name], *(_score(value, row.higher_is_better) for value in (*row.values, row.forgetting)))
        for row in table.rows
    ]
    yield _table(("task", "rows", *table.columns, "forgetting"), lines)
    told = [
        "Shares are of solved rows; other figures are losses of a token, of which less is better.",
        "Forgetting is the best earlier score minus the last one, and for a loss its rise.",
    ]
    if table.kept_told is not None:
        told.append(f"Forgotten of what was to be kept: {table.kept_told}.")
    if table.mean_forgetting is not None:
        told.append(f"Mean forgetting: {table.mean_forgetting:.1%}.")
    yield " ".join(told)


def _score(value: float | None, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if percent else f"{value:.3f}"


def _versions(record: RunRecord) -> Iterator[str]:
    """Yield the releases that the run was last started with; nothing for a run of a release that did not note them."""
    runs = record.lines("run")
    if runs and "environment" in runs[-1]:
        yield "## Versions"
        ranks, found = runs[-1]["world_size"], runs[-1]["environment"]
        # Of the machine nothing else is told.
        releases = ", ".join(f"{name} {found[name]}" for name in _RELEASES if name in found)
        yield f"{releases}; on {ranks} {'rank' if ranks == 1 else 'ranks'}."


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Return a text that is no Markdown or HTML by itself, on one line."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
