"""The steps of a recipe's stages against everything that counts in steps: refreshes, warm-ups, schedules, replay."""

from __future__ import annotations

from typing import NamedTuple

from trl import SFTConfig

from epi_ds.choices import ADAPTIVE
from epi_ds.config import RatioSchedule
from epi_ds.errors import Problem
from epi_ds.isolation.policy import make_policy
from epi_ds.isolation.schedule import planned_steps_of
from epi_ds.policy_rules import selects_by_steps
from epi_ds.recipe.models import Recipe, Stage
from epi_ds.train.measuring import num_windows_of
from epi_ds.train.refusals import refused_by_libraries
from epi_ds.train.replay import NOTHING, exact_share, new_rows
from epi_ds.train.rows import stage_rows_of
from epi_ds.train.schedules import learning_rate_of
from epi_ds.train.stages import StageSpan, span_of
from epi_ds.train.validation.data import Data, Rows
from epi_ds.train.validation.findings import Findings


class PlannedStage(NamedTuple):
    """What a stage would do."""

    name: str
    num_rows: int
    num_steps: int
    num_replayed: int
    """Rows of these steps that are drawn from what is kept, and from finished stages."""
    num_refreshes: int
    """By the steps; under ``refresh_interval: adaptive`` as often the mask is looked at."""
    tokens_per_step: int | None
    """On average, of the stage's own rows and replayed ones alike; None where rows were not tokenised."""


def plan(
    recipe: Recipe, data: Data, args: SFTConfig, findings: Findings, *, global_batch: int
) -> tuple[PlannedStage, ...]:
    """Return what the stages would do, as far as their rows are known, and tell what does not fit into their steps."""
    keep = recipe.method.keep
    share = NOTHING if keep is None else exact_share(keep.replay)
    policy = make_policy(recipe.method.epi)
    planned: list[PlannedStage] = []
    spans: list[StageSpan] = []
    for index, (stage, sources) in enumerate(zip(recipe.stages, data.stages, strict=True)):
        known = [source for source in sources if source is not None]
        if len(known) < len(sources):
            findings.unchecked(f"stages.{index}", f"the steps of stage {stage.name} and of those behind it")
            break
        rows = stage_rows_of(stage, [source.num_rows for source in known])
        first_step = spans[-1].stop_step if spans else 0
        span = None
        with findings.told(f"stages.{index}"):
            span = span_of(rows, first_step=first_step, global_batch=global_batch, replayed_share=share)
        if span is None:
            # The others' steps are known as if it were not there.
            continue
        spans.append(span)
        _check_schedule(index, stage, span, args, findings)
        num_new = new_rows(span.num_steps, share=share, first_step=first_step, global_batch=global_batch)
        refreshes = sum(policy.refreshes(step + 1) for step in range(span.first_step, span.stop_step))
        planned.append(
            PlannedStage(
                name=stage.name,
                num_rows=rows.num_rows,
                num_steps=span.num_steps,
                num_replayed=span.num_steps * global_batch - num_new,
                num_refreshes=refreshes,
                tokens_per_step=_tokens_per_step(known, global_batch),
            )
        )
    if len(spans) == len(recipe.stages):
        _check_isolation(recipe, spans[-1].stop_step, findings)
        if spans[-1].stop_step > first_refresh(recipe):
            _check_refreshes(recipe, planned, findings)
    _check_kept(recipe, data, findings, global_batch=global_batch)
    return tuple(planned)


def first_refresh(recipe: Recipe) -> int:
    """Return the step after which the first mask is due by the interval."""
    config = recipe.method.epi
    return max(config.selection_interval, config.warmup_steps)


def _tokens_per_step(sources: list[Rows], global_batch: int) -> int | None:
    if any(source.num_tokens is None for source in sources):
        return None
    num_rows = sum(source.num_rows for source in sources)
    return round(global_batch * sum(source.num_tokens or 0 for source in sources) / max(num_rows, 1))


def _check_schedule(index: int, stage: Stage, span: StageSpan, args: SFTConfig, findings: Findings) -> None:
    own = stage.lr_scheduler_type is not None
    key = f"stages.{index}.lr_scheduler_type" if own else "train.lr_scheduler_type"
    with findings.told(key), refused_by_libraries():
        learning_rate_of(stage, span, args)
    warmup = args.get_warmup_steps(span.num_steps) if stage.warmup_steps is None else stage.warmup_steps
    if warmup >= span.num_steps > 1:
        findings.warning(
            f"stages.{index}.warmup_steps" if stage.warmup_steps is not None else "train.warmup_steps",
            f"the learning rate of stage {stage.name} rises over {warmup} steps, and the stage has {span.num_steps}: "
            f"it never reaches its peak; set at most {max(span.num_steps // 10, 1)}, or train longer",
        )


def _check_isolation(recipe: Recipe, num_steps: int, findings: Findings) -> None:
    config, keep = recipe.method.epi, recipe.method.keep
    begins_with_mask = keep is not None and keep.importance and not config.warmup_steps
    found = planned_steps_of(config, num_steps, begins_with_mask=begins_with_mask)
    setting = "check_interval" if config.refresh_interval == ADAPTIVE else "refresh_interval"
    key = f"method.epi.{'warmup_steps' if config.warmup_steps > config.selection_interval else setting}"
    if found is not None and found.is_refused:
        findings.problem(Problem(key, found.message))
    elif found is not None:
        findings.warning(key, found.message)
    ratio = config.ratio
    if isinstance(ratio, RatioSchedule) and config.warmup_steps + ratio.steps > num_steps:
        findings.warning(
            "method.epi.ratio",
            f"the schedule of the ratio arrives at its end after step {config.warmup_steps + ratio.steps}, and the run "
            f"has {num_steps} steps: the last masks isolate another share than {ratio.end}",
        )


def _check_refreshes(recipe: Recipe, planned: list[PlannedStage], findings: Findings) -> None:
    config = recipe.method.epi
    if not selects_by_steps(config) or len(planned) < 2:
        return
    for index, stage in enumerate(planned):
        if not stage.num_refreshes:
            findings.warning(
                f"stages.{index}",
                f"stage {stage.name} has {stage.num_steps} steps, and no refresh is due in it, every "
                f"{config.selection_interval} steps of the run: the mask does not follow what it trains; set "
                f"method.epi.refresh_interval to at most {max(stage.num_steps // 10, 1)}, or train it longer",
            )


def _check_kept(recipe: Recipe, data: Data, findings: Findings, *, global_batch: int) -> None:
    keep = recipe.method.keep
    known = [rows.num_rows for rows in data.kept if rows is not None]
    if keep is None or not keep.importance or len(known) < len(data.kept):
        return
    with findings.told("method.keep"):
        num_windows_of(keep, sum(known), global_batch=global_batch)
