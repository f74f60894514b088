"""What is written and shown of the trainer's steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.evaluation.scores import Score, Scored
from epi_ds.hf import EPICallback
from epi_ds.isolation.refresh_report import Decision, RefreshReport
from epi_ds.train.environment import environment, peak_bytes
from epi_ds.train.metrics import BEFORE, MetricsWriter, evaluation_told
from epi_ds.train.origins import FromHub
from epi_ds.train.progress import ProgressDisplay
from epi_ds.train.settings import Change
from epi_ds.train.stages import StageSpan, stage_at
from epi_ds.train.trainer import StageTrainer
from epi_ds.zero3.handle import EPI

# TRL counts these from the start of the process, so after a resume they would fall back. The trainer's own count of
# tokens goes on: train.include_num_input_tokens_seen.
_PER_PROCESS = ("num_tokens",)


class MetricsCallback(TrainerCallback):
    """Writes a run's metrics and shows its progress. Every rank calls all of it; rank 0 writes and shows.

    To be added before `StageCallback`: what a step did is written before what the end of its stage does.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        *,
        isolation: EPICallback,
        metrics: MetricsWriter | None,
        progress: ProgressDisplay,
        changed: Sequence[Change],
        from_hub: FromHub,
    ) -> None:
        """``metrics`` is None on all ranks but 0; ``changed`` are the settings that this start of the run changed."""
        self._trainer = trainer
        self._isolation = isolation
        self._metrics = metrics
        self._progress = progress
        self._changed = changed
        self._from_hub = from_hub
        self._started = 0.0
        self._seconds = 0.0
        self._isolated_in_force = 0
        self._last_refresh: RefreshReport | None = None
        self._last_decision: Decision | None = None

    @property
    def _epi(self) -> EPI:
        return self._isolation.epi

    @property
    def _spans(self) -> list[StageSpan]:
        return self._trainer.spans

    def _write(self, event: str, step: int, stage: str, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(event, step=step, stage=stage, **values)

    # --- the trainer's events, in order ---

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write that the run starts or goes on, and what it was told."""
        self._last_refresh = self._epi.stats().last_refresh
        self._write(
            "run",
            state.global_step,
            stage_at(self._spans, state.global_step).name,
            resumed=state.global_step > 0,
            world_size=dist.get_world_size(),
            total_steps=state.max_steps,
            stages={span.name: [span.first_step, span.stop_step] for span in self._spans},
            rows=self._trainer.num_rows,
            covered=self._epi.stats().covered,
            config=self._epi.config.model_dump(mode="json"),
            changed=[change._asdict() for change in self._changed],
            from_hub=self._from_hub._asdict(),
            environment=environment(),
        )
        if self._last_refresh is not None and state.global_step == 0:
            # A policy that selects before the first step did so when the engine was made.
            self.write_refresh(0, BEFORE, self._last_refresh)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what this step runs under."""
        self._started = time.perf_counter()
        self._isolated_in_force = self._epi.stats().isolated

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the step found about the mask."""
        self._seconds = time.perf_counter() - self._started
        step = state.global_step
        stage = stage_at(self._spans, step - 1)
        decision = self._epi.stats().last_decision
        if decision is not None and decision is not self._last_decision:
            self._last_decision = decision
            self._write_drift(step, stage.name, decision)
        refresh = self._epi.stats().last_refresh
        if refresh is not None and refresh is not self._last_refresh:
            self.write_refresh(step, stage.name, refresh)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what the trainer logged of the steps since its last log."""
        if logs is None or "loss" not in logs:
            return
        stage = stage_at(self._spans, state.global_step - 1).name
        share = self._isolated_in_force / self._epi.stats().covered
        self._write(
            "step",
            state.global_step,
            stage,
            **{k: v for k, v in logs.items() if isinstance(v, (int, float)) and k not in _PER_PROCESS},
            source_losses=self._trainer.source_losses.take(),
            isolated=self._isolated_in_force,
            isolated_share=share,
            seconds=self._seconds,
        )
        self._progress.step(state.global_step, stage=stage, loss=float(logs["loss"]), isolated_share=share)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write how long a save took, and whether there is a checkpoint of it now."""
        step, failed = state.global_step, self._epi.run.failed
        self._write(
            "save",
            step,
            stage_at(self._spans, step - 1).name,
            seconds=time.perf_counter() - self._trainer.save_started,
            # The engine's part of it is a folder inside.
            failed=failed is not None and f"checkpoint-{step}" in (failed.name, failed.parent.name),
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sum the run up, if this is its end."""
        if state.global_step < state.max_steps:
            return
        stats = self._epi.stats()
        self._write(
            "summary",
            state.global_step,
            self._spans[-1].name,
            active_share=stats.active_share,
            refreshes=stats.counters.refreshes,
            achieved_ratio=stats.achieved_ratio,
            skipped_steps=self._trainer.model_wrapped.skipped_steps,
            memory_bytes=self._epi.memory_report().total_bytes,
            peak_bytes=peak_bytes(),
        )
        self._progress.note(
            f"a mask was active in {stats.active_share:.0%} of {stats.counters.applied_steps} steps "
            f"({stats.counters.refreshes} refreshes)"
        )

    # --- what others have to say ---

    def write_evaluation(self, step: int, stage: str, scores: Mapping[str, Score], *, seconds: float) -> None:
        """Write and show the scores of all tasks by name; ``stage`` is the one of the step, or `BEFORE`."""
        ended = step in {0, *(span.stop_step for span in self._spans)}
        found = {"stage_ended": ended, "scores": {name: score._asdict() for name, score in scores.items()}}
        self._write("evaluation", step, stage, **found, seconds=seconds)
        self._progress.note(evaluation_told({"step": step, "stage": stage, **found}))

    def show_scored(self, scored: Scored) -> None:
        """Show how far an evaluation has come."""
        self._progress.evaluation(scored.task, done=scored.done, total=scored.total, seconds=scored.seconds)

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics hold an evaluation of a step. Collective: the first rank has the file."""
        metrics = self._metrics
        return on_first_rank(lambda: metrics is not None and metrics.holds("evaluation", step=step))

    def write_refresh(self, step: int, stage: str, refresh: RefreshReport) -> None:
        """Write what a refresh found, once."""
        self._last_refresh = refresh
        layers = refresh.layers
        self._write(
            "refresh",
            step,
            stage,
            ratio=refresh.ratio,
            achieved_ratio=refresh.achieved_ratio,
            budget=refresh.budget,
            isolated=refresh.isolated,
            tied_mass=refresh.tied_mass,
            tasks=[task._asdict() for task in refresh.tasks],
            jaccard=refresh.jaccard,
            jaccard_first=refresh.jaccard_first,
            held_gradient_energy=refresh.held_gradient_energy,
            held_step_energy=refresh.held_step_energy,
            layer_numel={layer.name: layer.numel for layer in layers},
            layer_isolated={layer.name: layer.isolated for layer in layers},
            layer_flip_rate={layer.name: layer.flip_rate for layer in layers},
            layer_importance={
                layer.name: {**found._asdict(), "threshold": found.threshold if isfinite(found.threshold) else None}
                for layer, found in zip(layers, refresh.importance, strict=True)
            },
            kind_numel={kind.name: kind.numel for kind in refresh.kinds},
            kind_isolated={kind.name: kind.isolated for kind in refresh.kinds},
            seconds=refresh.seconds,
            collectives=refresh.collectives,
            sent_bytes=refresh.sent_bytes,
        )

    def _write_drift(self, step: int, stage: str, decision: Decision) -> None:
        if decision.drift is not None:
            refreshed = decision.thresholds is not None
            self._write("drift", step, stage, **decision.drift._asdict(), ratio=decision.ratio, refreshed=refreshed)
