"""A run as a report tells it: frozen values from the lines of its metrics file, whatever release wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.defaults import Setting
from epi_ds.errors import UserError
from epi_ds.report.scores import ScoreTable, score_history, score_table

Line = Mapping[str, Any]


class Start(NamedTuple):
    """A start of the run, or a resume."""

    step: int
    resumed: bool
    ranks: int
    config: Mapping[str, Any]
    """The ``epi`` settings."""
    changed: tuple[Mapping[str, Any], ...]
    """Settings that it changed: ``key``, ``before``, ``now``."""
    environment: Mapping[str, Any]
    """Versions and machine; empty where an earlier release wrote it."""


class Step(NamedTuple):
    """A step that was logged."""

    step: int
    loss: float | None
    source_losses: Mapping[str, float | None]
    isolated: int
    isolated_share: float
    seconds: float | None


class Layer(NamedTuple):
    """One layer, or one kind of matrix, at a refresh."""

    name: str
    numel: int
    isolated: int
    flip_rate: float | None
    """Share of what was isolated that was released; None where nothing was, or of a kind."""
    smallest: float | None
    threshold: float | None
    """Importance from which on entries are isolated; None where none are."""
    largest: float | None
    largest_in: str

    @property
    def share(self) -> float:
        """Isolated share of its entries."""
        return self.isolated / self.numel if self.numel else 0.0


class Refresh(NamedTuple):
    """A new mask."""

    step: int
    stage: str
    isolated: int
    budget: int | None
    jaccard: float | None
    jaccard_first: float | None
    held_gradient_energy: float | None
    layers: tuple[Layer, ...]
    kinds: tuple[Layer, ...]
    seconds: float | None


class Save(NamedTuple):
    """A save of a checkpoint."""

    step: int
    seconds: float
    failed: bool


class Lost(NamedTuple):
    """A number that was not finite."""

    event: str
    step: int
    name: str
    said: str
    """``nan``, ``inf``, or what held it."""


class Audit(NamedTuple):
    """What an audit of the run's checkpoints said."""

    verdict: str
    counts: str
    is_sound: bool | None
    """Whether nothing moved that must not; None where nothing could be compared."""


@dataclass(frozen=True)
class Run:
    """Everything that a report knows of one run."""

    name: str
    place: str
    """Its folder, as commands take it."""
    starts: tuple[Start, ...]
    total_steps: int
    covered: int
    stages: Mapping[str, tuple[int, int]]
    """First step and stop step of every stage, in order."""
    steps: tuple[Step, ...]
    refreshes: tuple[Refresh, ...]
    saves: tuple[Save, ...]
    evaluation_seconds: tuple[float, ...]
    lost: tuple[Lost, ...]
    own_rows: Line | None
    summary: Line | None
    """None where not all steps were trained."""
    is_exported: bool
    """Whether everything is on the disk, the model too; True of what earlier releases wrote, which did not say so."""
    scores: ScoreTable
    """Before training, after every stage, and last."""
    history: ScoreTable
    """At all evaluations."""
    settings: tuple[Setting, ...] = ()
    """Of its recipe; empty where that is gone."""
    displacement: Mapping[str, float] | None = None
    """By layer, how far the weights went from where they began, over their length there; None where nobody measured."""
    audit: Audit | None = None

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        return max((self.starts[-1].step, *(step.step for step in self.steps[-1:])))

    @property
    def active_share(self) -> float | None:
        """Share of the logged steps in which something was isolated; None without steps."""
        return sum(step.isolated > 0 for step in self.steps) / len(self.steps) if self.steps else None


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return what runs are called: the ends of their paths, as long as it takes to tell them apart.

    Raises UserError for a folder that is given twice.
    """
    parts = [folder.absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(folder for place, folder in enumerate(folders) if parts[place] in parts[:place])
        raise UserError(f"{twice} is given twice; give each run once")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_run(
    name: str,
    metrics: Sequence[Line],
    *,
    place: str,
    settings: Sequence[Setting] = (),
    displacement: Mapping[str, float] | None = None,
    audit: Audit | None = None,
) -> Run:
    """Return a run from the lines of its metrics file. Raises UserError where no run ever started."""

    def of(event: str) -> list[Line]:
        return [line for line in metrics if line["event"] == event]

    starts = of("run")
    if not starts:
        raise UserError(f"there is nothing to report: {place} holds no metrics of a run")
    return Run(
        name=name,
        place=place,
        starts=tuple(map(_start, starts)),
        total_steps=starts[-1]["total_steps"],
        covered=starts[-1]["covered"],
        stages={stage: (span[0], span[1]) for stage, span in starts[-1]["stages"].items()},
        steps=tuple(map(_step, of("step"))),
        refreshes=tuple(map(_refresh, of("refresh"))),
        saves=tuple(Save(line["step"], line["seconds"], bool(line.get("failed"))) for line in of("save")),
        evaluation_seconds=tuple(line["seconds"] for line in of("evaluation") if line.get("seconds") is not None),
        lost=tuple(
            Lost(line["event"], line["step"], key, str(said))
            for line in metrics
            for key, said in line.get("not_finite", {}).items()
        ),
        own_rows=next(iter(of("own_rows")), None),
        summary=next(iter(of("summary")[-1:]), None),
        is_exported=bool(of("end")) or "environment" not in starts[-1],
        scores=score_table(metrics),
        history=score_history(metrics),
        settings=tuple(settings),
        displacement=displacement,
        audit=audit,
    )


def _start(line: Line) -> Start:
    return Start(
        step=line["step"],
        resumed=bool(line["resumed"]),
        ranks=line["world_size"],
        config=line["config"],
        changed=tuple(line.get("changed", ())),
        environment=line.get("environment", {}),
    )


def _step(line: Line) -> Step:
    return Step(
        step=line["step"],
        loss=line["loss"],
        source_losses=line.get("source_losses", {}),
        isolated=line["isolated"],
        isolated_share=line["isolated_share"],
        seconds=line.get("seconds"),
    )


def _refresh(line: Line) -> Refresh:
    importance, flips = line.get("layer_importance", {}), line.get("layer_flip_rate", {})

    def layers(numel: Mapping[str, int], isolated: Mapping[str, int], *, known: bool) -> tuple[Layer, ...]:
        return tuple(
            Layer(
                name=name,
                numel=numel[name],
                isolated=isolated[name],
                flip_rate=flips.get(name) if known else None,
                smallest=importance.get(name, {}).get("smallest") if known else None,
                threshold=importance.get(name, {}).get("threshold") if known else None,
                largest=importance.get(name, {}).get("largest") if known else None,
                largest_in=importance.get(name, {}).get("largest_in", "") if known else "",
            )
            for name in numel
        )

    return Refresh(
        step=line["step"],
        stage=line["stage"],
        isolated=line["isolated"],
        budget=line.get("budget"),
        jaccard=line["jaccard"],
        jaccard_first=line.get("jaccard_first"),
        held_gradient_energy=line.get("held_gradient_energy"),
        layers=layers(line["layer_numel"], line["layer_isolated"], known=True),
        # A layer and a kind may have one name.
        kinds=layers(line.get("kind_numel", {}), line.get("kind_isolated", {}), known=False),
        seconds=line.get("seconds"),
    )
