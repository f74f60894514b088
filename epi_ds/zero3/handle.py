"""``engine.epi``: how users and tests look at isolation and steer it.

[Note: names] A DeepSpeed engine passes names that it does not have on to its module, so that every attribute which
isolation adds to an engine hides one of the user's model. It adds one, ``epi``, and refuses a module that has an
attribute of that name. What the classes of engine and optimizer need besides begins with ``_epi_``; everything else is
a method of DeepSpeed's. tests/zero3/test_contract.py holds it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.checkpoint.commit import Run
from epi_ds.choices import ADAPTIVE, Memory, PolicyName, StateFormat
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError, nearest
from epi_ds.isolation.controller import IsolationController
from epi_ds.isolation.counters import Counters
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.refresh_report import Decision, RefreshReport, values_of
from epi_ds.isolation.schedule import check_planned_steps, largest_ratio

logger = logging.getLogger(__name__)


class IsolationStats(NamedTuple):
    """Counts over all ranks, as of now."""

    counters: Counters
    covered: int
    """Entries that can be isolated."""
    isolated: int
    last_refresh: RefreshReport | None
    last_decision: Decision | None
    """Of the last step after which a mask could be selected; with ``refresh_interval: adaptive`` it may have stayed."""

    @property
    def achieved_ratio(self) -> float:
        """Isolated share of the covered entries."""
        return self.isolated / self.covered

    @property
    def active_share(self) -> float:
        """Share of the applied steps that ran under a mask with an isolated entry."""
        return self.counters.active_steps / max(1, self.counters.applied_steps)


class ResolvedLayer(NamedTuple):
    """A layer, and which parameters a pattern or a name has put into it."""

    name: str
    numel: int
    parameters: tuple[str, ...]


class MemoryReport(NamedTuple):
    """Bytes of isolation's state on this rank that outlive a step, measured from its tensors."""

    state_bytes: dict[str, int]
    """``importance`` where it is ours; ``remembered_relative`` under ``memory: stage_max``, or ``task/...`` for each
    finished stage under ``per_task``; ``masks``; and the sample of the ``first_mask``."""
    covered_numel: int
    """Covered entries over all ranks."""
    world_size: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.state_bytes.values())

    @property
    def bytes_per_parameter_share(self) -> float:
        """Bytes on this rank per covered parameter, times the world size."""
        return self.total_bytes * self.world_size / self.covered_numel


class EPI:
    """The isolation of one engine. Methods marked collective must be called by every rank."""

    def __init__(self, engine: Any, controller: IsolationController, *, run: Run) -> None:
        self._engine = engine
        self._controller = controller
        self.run = run
        """The checkpoints of the run, for the parts of the library that save and load them."""

    @property
    def config(self) -> EPIConfig:
        """The configuration in force."""
        return self._controller.config

    @property
    def controller(self) -> IsolationController:
        """The controller, for the parts of the library that save and restore it."""
        return self._controller

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the covered parameters."""
        return tuple(self._controller.layout.by_name)

    def mask(self, name: str) -> Tensor:
        """Gather the mask of one parameter. Collective. -> its full shape, bool, CPU; True = isolated."""
        segment = self._segment(name)
        return self._gather(segment, self._controller.masks.segment(segment).to(torch.uint8)).bool()

    def importance(self, name: str) -> Tensor:
        """Gather the importance of one parameter. Collective. -> its full shape, fp32, CPU."""
        segment = self._segment(name)
        return self._gather(segment, self._controller.segment_importance(segment))

    def thresholds(self) -> dict[str, float]:
        """Return the importance at which each layer's entries are isolated, by layer; inf isolates none of them.

        Empty before the first refresh.
        """
        codes = self._controller.refresher.threshold_codes
        if codes is None:
            return {}
        return dict(zip(self._controller.layout.layer_names, values_of(codes), strict=True))

    def layers(self) -> list[ResolvedLayer]:
        """Return the resolved layer table."""
        layout = self._controller.layout
        names: list[list[str]] = [[] for _ in layout.layer_names]
        for segment in layout.segments:
            names[segment.layer].append(segment.name)
        return [
            ResolvedLayer(name, numel, tuple(members))
            for name, numel, members in zip(layout.layer_names, layout.layer_numel, names, strict=True)
        ]

    def stats(self) -> IsolationStats:
        """Return counters and the last refresh. The same on every rank, without communication."""
        controller = self._controller
        return IsolationStats(
            controller.counters,
            controller.layout.covered_numel,
            controller.isolated,
            controller.refresher.last_refresh,
            controller.refresher.last_decision,
        )

    def memory_report(self) -> MemoryReport:
        """Return what isolation keeps on this rank."""
        return MemoryReport(
            self._controller.state_bytes(),
            self._controller.layout.covered_numel,
            self._controller.exchange.world_size,
        )

    def refresh_now(self) -> RefreshReport:
        """Select a new mask from the importance as it is, between two steps. Collective.

        Raises UserError under ``policy: none`` or in an accumulation window, and RuntimeError where nothing is
        measured.
        """
        self._check_window("refresh_now()")
        if self.config.policy is PolicyName.NONE:
            raise UserError("policy: none isolates nothing, but a refresh selects a mask; set policy: evolving")
        return self._controller.refresh()

    def finish_stage(self, name: str | None = None) -> RefreshReport | None:
        """Remember what the stage that ends needed, and select the mask that the next one begins with. Collective.

        Between two steps; does nothing and returns None under ``memory: none``, and under a policy that measures
        nothing while it trains. ``memory: per_task`` wants the stage's ``name``, and raises UserError without; a stage
        of a name that ended before is the same task, trained further.
        UserError also in the middle of an accumulation window.
        """
        self._check_window("finish_stage()")
        return self._controller.finish_stage(name)

    def check_planned_steps(self, planned_steps: int) -> None:
        """Warn or raise ValueError when a run of this many applied steps would never use a mask, or hardly."""
        config = self.config
        if not self._controller.is_active and config.policy is PolicyName.EVOLVING and largest_ratio(config) > 0:
            check_planned_steps(
                planned_steps,
                config.selection_interval,
                setting="check_interval" if config.refresh_interval == ADAPTIVE else "refresh_interval",
                warmup_steps=config.warmup_steps,
                allow_inactive=config.allow_inactive,
            )

    def reset_optimizer_state(self) -> None:
        """Return the optimizer's moments to zero, as between two stages. Importance and masks continue.

        Raises UserError under ``state: adam``, where the moments are the importance.
        """
        if self.config.state is StateFormat.ADAM:
            raise UserError(
                "the second moments are the importance under state: adam, and a reset would forget it; carry the "
                "optimizer's state over, or set another state"
            )
        self._engine.optimizer._epi_reset_optimizer_state()

    def probe(self, losses: Iterable[Tensor]) -> RefreshReport:
        """Isolate by the mean squared gradient of ``losses``, taken without stepping. Collective.

        losses  one scalar loss per micro-batch, from the engine's forward, as ``engine.backward`` takes it; consumed
                one at a time, so a generator that runs the forward keeps one graph alive:
                ``epi.probe(engine(**batch).loss for batch in batches)``

        What is squared is the gradient of a global batch, of as many micro-batches as the engine accumulates: the
        importance is then the same at every number of ranks. Losses that fill no whole one are left out, with a
        warning. The losses decide how much is probed: ``probe_steps`` says it to `epi-ds train` only, and elsewhere
        that the mask comes from a call of this method before the first step. Importance measured so far is replaced.

        Raises UserError under ``policy: none``, in an accumulation window and for fewer losses than a global batch has,
        and RuntimeError when none gave finite gradients. Afterwards the importance is freed unless the policy measures
        it during training.
        """
        controller = self._controller
        if self.config.policy is PolicyName.NONE:
            raise UserError("policy: none isolates nothing, but a probe selects a mask; set policy: static")
        if self.config.state is StateFormat.ADAM:
            raise UserError("state: adam has no importance of its own for a probe to measure; set another state")
        self._measure("probe()", losses)
        refresh = controller.refresh()
        if not controller.observes:
            controller.stop_measuring()
        return refresh

    def remember(self, name: str, losses: Iterable[Tensor]) -> RefreshReport | None:
        """Measure importance on ``losses`` without stepping, and remember it as that of a finished stage. Collective.

        name    of the stage, under which ``memory: per_task`` keeps it
        losses  see `probe`: of what the model can, and is not to forget

        Every later mask protects it, under every policy; ``policy: static`` selects its mask from it now, and
        ``evolving`` the first one. The importance of the run is measured anew from the next step on: what it was
        before is replaced. Returns None where no mask was selected.

        Raises UserError under ``memory: none``, and what `probe` raises.
        """
        if self.config.memory is Memory.NONE:
            raise UserError(f"remember({name!r}): memory: none remembers nothing; set memory: stage_max or per_task")
        if not name:
            raise UserError("remember() keeps what it measures as a finished stage; give it a name, such as base")
        self._measure("remember()", losses)
        return self._controller.remember(name)

    def _measure(self, call: str, losses: Iterable[Tensor]) -> None:
        """Replace the importance by the mean squared gradient of the global batches of ``losses``. Collective."""
        engine, controller = self._engine, self._controller
        self._check_window(call)
        accumulation = engine.gradient_accumulation_steps()
        controller.start_measuring()
        taken = observed = 0
        try:
            for taken, loss in enumerate(losses, 1):
                # With offload, gradients leave the accelerator at a boundary only.
                engine.set_gradient_accumulation_boundary(taken % accumulation == 0)
                engine.backward(loss / accumulation, scale_wrt_gas=False)
                if taken % accumulation == 0:
                    observed += engine.optimizer._epi_observe_probe(ema_decay=observed / (observed + 1))
            if taken % accumulation:
                engine.optimizer._epi_drop_window()
        finally:
            engine.set_gradient_accumulation_boundary(None)
            if not observed and not controller.observes:
                controller.stop_measuring()
        if taken < accumulation:
            raise UserError(
                f"{call} was given {taken} losses, and a global batch has {accumulation} micro-batches on every rank "
                "(gradient_accumulation_steps); give as many, or a multiple of it"
            )
        if taken % accumulation and dist.get_rank() == 0:
            logger.warning(
                "%s left out the last %d of %d losses, which fill no global batch of %d micro-batches",
                call,
                taken % accumulation,
                taken,
                accumulation,
            )
        if not observed:
            raise RuntimeError(
                f"{call} saw no finite gradient, so there is no importance to select a mask from; give it more "
                f"batches, or correct the loss (the loss scale is {float(engine.optimizer.loss_scale):g} now)"
            )

    def _check_window(self, call: str) -> None:
        self._engine.optimizer._epi_context.window.check_closed(
            call, because="all of its gradients are to be under one mask", remedy="call it"
        )

    def _segment(self, name: str) -> Segment:
        segments = self._controller.layout.by_name
        if name not in segments:
            raise UserError(f"{name!r} is not a covered parameter{nearest(name, segments)}")
        return segments[name]

    def _gather(self, segment: Segment, values: Tensor) -> Tensor:
        padded = values.new_zeros(segment.partition_numel)
        padded[: segment.real_numel] = values
        gathered = self._controller.exchange.concatenate(padded).cpu()
        return gathered[: math.prod(segment.shape)].view(segment.shape)
