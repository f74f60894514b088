"""``engine.epi``: how users and tests look at isolation and steer it.

[Note: names] A DeepSpeed engine passes names that it does not have on to its module, so that every attribute which
isolation adds to an engine hides one of the user's model. It adds one, ``epi``, and refuses a module that has an
attribute of that name. What the classes of engine and optimizer need besides begins with ``_epi_``; everything else is
a method of DeepSpeed's. tests/zero3/test_contract.py holds it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epi_ds.checkpoint.commit import Run
from epi_ds.checkpoint.meeting import meet
from epi_ds.choices import Memory, PolicyName, StateFormat
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError, nearest
from epi_ds.isolation.controller import IsolationController
from epi_ds.isolation.layout import Segment
from epi_ds.isolation.refresh_report import RefreshReport, values_of
from epi_ds.isolation.schedule import planned_steps_of
from epi_ds.policy_rules import UNMEASURED
from epi_ds.zero3.anchor import Anchor
from epi_ds.zero3.probing import drop_window, observe_window
from epi_ds.zero3.stats import IsolationStats, MemoryReport, ResolvedLayer

logger = logging.getLogger(__name__)


class EPI:
    """The isolation of one engine. Methods marked collective must be called by every rank.

    Where one does not come, LostRankError names it: once the process group's time-out is over, or at once where it has
    ended. What changes the isolation meets every time. `mask`, `importance` and `anchor`, which are called for every
    parameter, meet once between two steps for each of their names, so that a loop over all parameters costs one meeting
    and not one for each, see [Note: meeting] in checkpoint/meeting.py: a rank that stays away from a later call of
    these between the same two steps is not named.
    """

    def __init__(self, engine: Any, controller: IsolationController, *, run: Run) -> None:
        self._engine = engine
        self._controller = controller
        self.run = run
        """The checkpoints of the run, for the parts of the library that save and load them."""
        # Steps before which ranks met last for what is gathered, by name.
        self._met: dict[str, int] = {}

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
        return self._gather("mask()", segment, self._controller.masks.segment(segment).to(torch.uint8)).bool()

    def importance(self, name: str) -> Tensor:
        """Gather the importance of one parameter. Collective. -> its full shape, fp32, CPU."""
        segment = self._segment(name)
        return self._gather("importance()", segment, self._controller.segment_importance(segment))

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

    def anchor(self, name: str) -> Tensor:
        """Gather what one parameter is pulled towards. Collective. -> its full shape, fp32, CPU.

        Raises UserError without an anchor, and before the first step, which takes the weights that it is to be.
        """
        segment = self._segment(name)
        if self._anchor is None or not (self._anchor.is_taken or self._anchor.folder):
            reason = "there is none; set anchor" if self._anchor is None else "it is taken in the first step"
            raise UserError(f"the anchor of {name} was asked for, and {reason}")
        return self._gather("anchor()", segment, self._anchor.of(segment).float())

    def memory_report(self) -> MemoryReport:
        """Return what isolation keeps on this rank."""
        return MemoryReport(
            self._controller.state_bytes() | ({} if self._anchor is None else {"anchor": self._anchor.num_bytes}),
            self._controller.layout.covered_numel,
            self._controller.exchange.world_size,
        )

    def refresh_now(self) -> RefreshReport:
        """Select a new mask from the importance as it is, between two steps. Collective.

        Under ``policy: random`` and ``half`` that is another draw. Raises UserError under ``policy: none`` and
        ``first`` or in an accumulation window, and RuntimeError where nothing is measured.
        """
        self._check_window("refresh_now()")
        if self.config.policy is PolicyName.NONE:
            raise UserError("policy: none isolates nothing, but a refresh selects a mask; set policy: evolving")
        if self.config.policy is PolicyName.FIRST:
            raise UserError("policy: first selects one mask by itself and keeps it; set policy: evolving")
        _meet("refresh_now()")
        return self._controller.refresh()

    def finish_stage(self, name: str | None = None) -> RefreshReport | None:
        """Remember what the stage that ends needed, and select the mask that the next one begins with. Collective.

        Between two steps. Nothing is remembered under ``memory: none``, and by a policy that measures nothing while it
        trains; None is returned then but by a policy that draws anew for every stage (``half``, ``random`` with
        ``redraw: stage``). ``memory: per_task`` wants the stage's ``name``, and raises UserError without; a stage of a
        name that ended before is the same task, trained further.
        UserError also in the middle of an accumulation window.
        """
        self._check_window("finish_stage()")
        _meet("finish_stage()")
        # Before the stage's pull is forgotten: what is released now is set by it.
        refresh = self._controller.finish_stage(name)
        if self._anchor is not None:
            self._anchor.end_stage()
        return refresh

    @property
    def awaits_plan(self) -> bool:
        """Whether an anchor wants to hear from `plan_stage` before the next step, also where a checkpoint had sums."""
        return self._anchor is not None and self._anchor.strength.awaits_plan

    def plan_stage(self, total_rates: Sequence[float]) -> None:
        """Say what the learning rates of the stage that begins add up to, which an anchor's strength is divided by.

        total_rates  one sum per parameter group of the optimizer, over the steps of the stage

        After a load in the middle of a stage the sums of its beginning stay in force, and a difference is warned of.
        Without an anchor nothing happens. Raises UserError for another number of sums, and for one that is negative or
        not finite.
        """
        if self._anchor is None:
            return
        groups = len(self._engine.optimizer.optimizer.param_groups)
        if len(total_rates) != groups:
            raise UserError(
                f"plan_stage got {len(total_rates)} sums of learning rates, and the optimizer has {groups} parameter "
                "groups; give one sum of each"
            )
        warning = self._anchor.strength.plan(total_rates)
        if warning and dist.get_rank() == 0:
            logger.warning("%s", warning)

    def check_planned_steps(self, planned_steps: int) -> None:
        """Warn or raise ValueError when a run of this many applied steps would never use a mask, or hardly."""
        controller = self._controller
        # What was remembered before the first step has selected a mask already.
        begins_with_mask = controller.is_active and not controller.counters.applied_steps
        found = planned_steps_of(self.config, planned_steps, begins_with_mask=begins_with_mask)
        if found is None:
            return
        if found.is_refused:
            raise UserError(found.message)
        logger.warning("%s", found.message)

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

        Raises UserError under ``policy: none`` and those that do not select by a probe (``random``, ``half``,
        ``momentum``, ``first``), in an accumulation window and for fewer losses than a global batch has, and
        RuntimeError when none gave finite gradients. Afterwards the importance is freed unless the policy measures it
        during training.
        """
        controller = self._controller
        if self.config.policy is PolicyName.NONE:
            raise UserError("policy: none isolates nothing, but a probe selects a mask; set policy: static")
        if self.config.policy in UNMEASURED | {PolicyName.FIRST}:
            raise UserError(
                f"policy: {self.config.policy.value} does not select by a probe; set policy: static, or do not probe"
            )
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
        if self._anchor is not None:
            self._anchor.remembered_more()
        return self._controller.remember(name)

    def _measure(self, call: str, losses: Iterable[Tensor]) -> None:
        """Replace the importance by the mean squared gradient of the global batches of ``losses``. Collective."""
        engine, controller = self._engine, self._controller
        self._check_window(call)
        _meet(call)
        accumulation = engine.gradient_accumulation_steps()
        controller.start_measuring()
        taken = observed = 0
        try:
            for taken, loss in enumerate(losses, 1):
                # With offload, gradients leave the accelerator at a boundary only.
                engine.set_gradient_accumulation_boundary(taken % accumulation == 0)
                engine.backward(loss / accumulation, scale_wrt_gas=False)
                if taken % accumulation == 0:
                    observed += observe_window(engine.optimizer, ema_decay=observed / (observed + 1))
            if taken % accumulation:
                drop_window(engine.optimizer)
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

    @property
    def _anchor(self) -> Anchor | None:
        anchor: Anchor | None = self._engine.optimizer._epi_context.anchor
        return anchor

    def _check_window(self, call: str) -> None:
        self._engine.optimizer._epi_context.window.check_closed(
            call, because="all of its gradients are to be under one mask", remedy="call it"
        )

    def _segment(self, name: str) -> Segment:
        segments = self._controller.layout.by_name
        if name not in segments:
            raise UserError(f"{name!r} is not a covered parameter{nearest(name, segments)}")
        return segments[name]

    def _gather(self, call: str, segment: Segment, values: Tensor) -> Tensor:
        if self._met.get(call) != self._engine.global_steps:
            _meet(call)
            self._met[call] = self._engine.global_steps
        padded = values.new_zeros(segment.partition_numel)
        padded[: segment.real_numel] = values
        gathered = self._controller.exchange.concatenate(padded).cpu()
        return gathered[: math.prod(segment.shape)].view(segment.shape)


def _meet(call: str) -> None:
    """Wait for all ranks; see `EPI` and `meet`."""
    meet(f"engine.epi.{call}")
