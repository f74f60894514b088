"""What the manifest of a checkpoint says of it, and its run's metrics of the stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from epi_ds.anchor_config import RUN, STAGE
from epi_ds.checkpoint.manifest import Manifest
from epi_ds.choices import Memory, PolicyName, Protects
from epi_ds.config import EPIConfig
from epi_ds.defaults import with_defaults

# Policies that compare importance with thresholds, and nothing made of it.
_OF_IMPORTANCE = (PolicyName.EVOLVING, PolicyName.STATIC, PolicyName.FIRST)


class Facts(NamedTuple):
    """A checkpoint without its shards."""

    step: int
    """Optimizer steps before the save, skipped ones included."""
    applied_steps: int
    active_steps: int
    """Applied steps under a mask with an isolated entry."""
    stage: str | None
    """Of the last step; None where nothing says it."""
    saved_at: str
    run_id: str
    versions: dict[str, str]
    world_size: int
    batch_rows: int
    """Rows of a step."""
    model_dtype: str
    optimizer: str | None
    settings: dict[str, Any]
    """The ``epi`` section in force, defaults included."""
    observations: int
    """Gradients that have entered the importance."""
    refreshes: int
    finished_stages: int
    """Those that are remembered."""
    thresholds_are_importance: bool
    """Whether thresholds are values of importance; else they are of what was made of it, or of something else."""


def facts_of(manifest: Manifest, *, stage: str | None) -> Facts:
    """Return what a manifest knows."""
    counters = manifest.counters
    settings = with_defaults(EPIConfig, manifest.isolation.config)
    return Facts(
        step=manifest.step,
        applied_steps=counters.applied_steps,
        active_steps=counters.active_steps,
        stage=stage,
        saved_at=manifest.saved_at,
        run_id=manifest.run_id,
        versions=manifest.versions,
        world_size=manifest.world_size,
        batch_rows=manifest.batch.rows,
        model_dtype=manifest.model_dtype,
        optimizer=None if manifest.optimizer is None else manifest.optimizer.name,
        settings=settings,
        observations=counters.observations,
        refreshes=counters.refreshes,
        finished_stages=counters.finished_stages,
        thresholds_are_importance=_compares_importance(settings, finished_stages=counters.finished_stages),
    )


def _compares_importance(settings: Mapping[str, Any], *, finished_stages: int) -> bool:
    remembers = settings["memory"] != Memory.NONE and (finished_stages or settings["protects"] == Protects.PAST)
    return settings["policy"] in _OF_IMPORTANCE and settings["hysteresis"] == 1.0 and not remembers


def stage_at(metrics: Iterable[Mapping[str, Any]], step: int) -> str | None:
    """Return the stage of a step from the lines of a run's metrics; None where none is of it."""
    found = [line["stage"] for line in metrics if line["event"] == "step" and line["step"] == step]
    return str(found[-1]) if found else None


def anchor_sentence(manifest: Manifest) -> str:
    """Say in a line what weights are pulled towards, how, and where that lies."""
    anchor, settings = manifest.isolation.extra.anchor, manifest.isolation.config.get("anchor") or {}
    if anchor is None:
        return "none: weights are pulled towards nothing"
    towards = {RUN: "the weights before the run's first step", STAGE: "the weights before the stage's first step"}
    how = ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None and name != "to")
    if anchor.folder_files is not None:
        where = "read from that folder"
    else:
        where = "in the checkpoint" if anchor.is_taken else "not taken yet"
    return f"{towards.get(anchor.to, anchor.to)}, {where} ({how})"
