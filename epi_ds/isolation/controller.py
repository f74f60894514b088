"""When importance is observed, when masks are refreshed, and what a refresh found. Knows no DeepSpeed.

[Note: when] The mask of a window is fixed before the window's first backward: a refresh after applied step t selects
the mask in force from step t + 1 on, so norm, clipping and offload copies of one step all see the same mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from epi_ds.choices import Memory, PolicyName, StateFormat
from epi_ds.config import EPIConfig
from epi_ds.isolation.counters import Counters
from epi_ds.isolation.importance.remembered import Remembered
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.mask import MaskListener, Masks
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.policies.base import Policy
from epi_ds.isolation.refresh import Refresher
from epi_ds.isolation.refresh_report import RefreshReport
from epi_ds.isolation.schedule import largest_ratio
from epi_ds.isolation.search.collectives import GroupExchange
from epi_ds.kernels import Stored


class IsolationController:
    """Owns the importance and the masks of one rank's partitions."""

    def __init__(
        self,
        placement: Placement,
        config: EPIConfig,
        *,
        policy: Policy,
        exchange: GroupExchange,
        listener: MaskListener | None = None,
        moments: Importance | None = None,
    ) -> None:
        """``moments`` are what the optimizer keeps, where that is ranked by: the second moments for ``state: adam``,
        the size of the first ones for ``policy: momentum``.
        """
        self.placement = placement
        self.config = config
        self.exchange = exchange
        self.counters = Counters()
        self.refresher = Refresher(placement, config, exchange=exchange, listener=listener)
        self._policy = policy
        self._moments = moments
        self._stored: StoredImportance | None = None
        self._remembered = Remembered(placement, config)
        if policy.observes(1):
            self.start_measuring()

    # --- state ---

    @property
    def layout(self) -> Layout:
        """The geometry of this rank's partitions."""
        return self.placement.layout

    def start_measuring(self) -> None:
        """Allocate zero importance, if there is none yet and it is ours to keep."""
        config = self.config
        if self._stored is None and config.state is not StateFormat.ADAM:
            self._stored = StoredImportance(self.placement, config.state, seed=config.seed, purpose="importance")

    def stop_measuring(self) -> None:
        """Free the importance."""
        self._stored = None

    @property
    def states(self) -> dict[str, StoredImportance]:
        """Everything per entry that is ours beside the masks: ``importance`` where it is measured and not the
        optimizer's, and what is remembered of finished stages (see `Remembered.states`).
        """
        own = {} if self._stored is None else {"importance": self._stored}
        return own | self._remembered.states

    @property
    def observes(self) -> bool:
        """Whether the gradient of the step about to be applied enters importance of our own."""
        return self._stored is not None and self._policy.observes(self.counters.applied_steps + 1)

    @property
    def awaits_mask(self) -> bool:
        """Whether the mask of a static policy is still to come, from a probe or from what is remembered before the
        first step; the same on every rank.
        """
        config = self.config
        wants_one = config.policy is PolicyName.STATIC and config.mask_from is None and largest_ratio(config) > 0
        return wants_one and self.counters.refreshes == 0 and not self.is_active

    @property
    def masks(self) -> Masks:
        """The masks in force."""
        return self.refresher.masks

    @property
    def isolated(self) -> int:
        """Isolated entries over all ranks; the same on every rank."""
        return self.refresher.isolated

    @property
    def is_active(self) -> bool:
        """Whether any rank has an isolated entry; the same on every rank."""
        return self.isolated > 0

    def _importance(self) -> Importance:
        importance = self._stored if self._stored is not None else self._moments
        if importance is None:
            raise RuntimeError(f"there is no importance: policy {self.config.policy.value} does not measure it")
        return importance

    def remembered_importance(self) -> Importance | None:
        """Return what is remembered of all finished stages; None where none has ended. Collective.

        See `Remembered.largest`.
        """
        return self._remembered.largest(self.exchange)

    def segment_importance(self, segment: Segment) -> Tensor:
        """Return this rank's slice of a parameter's importance. [real_numel] fp32, not to be written to.

        Raises RuntimeError where nothing is measured.
        """
        return self._importance().read(segment, 0, segment.real_numel)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes on this rank of each of `states`, of the masks and of the sample of the first one."""
        sizes = {name: state.num_bytes for name, state in self.states.items()}
        sample = sum(bits.numel() for bits in self.refresher.first_mask.sample)
        return {**sizes, "masks": self.masks.num_bytes, "first_mask": sample}

    def restore(
        self,
        *,
        counters: Counters,
        threshold_codes: Tensor | None,
        mask_of: Callable[[Segment], Tensor],
        states: Sequence[str],
        stored_of: Callable[[str, Segment], Stored],
        first_mask: Sequence[Tensor] = (),
        last_row_codes: Tensor | None = None,
    ) -> None:
        """Replace the whole state. `refresher.add_up` is due then, on every rank.

        mask_of         -> [real_numel] bool
        states          names of those to have, as in `states`
        stored_of       a state's name and a segment -> what is stored of it
        first_mask      see `FirstMask.sample`
        last_row_codes  see `Refresher.last_row_codes`

        One segment after the other is asked for: what is loaded is never there twice.
        """
        if "importance" not in states:
            # A policy that measures for a while had stopped.
            self.stop_measuring()
        own = [name for name in states if name != "importance"]
        self._remembered.restart(own, is_empty=not counters.finished_stages)
        for name, state in self.states.items():
            for segment in self.layout.segments:
                state.load(segment, stored_of(name, segment), step=counters.observations)
        self.refresher.first_mask.restore(first_mask, self.placement.devices)
        self.refresher.last_row_codes = last_row_codes
        self.refresher.threshold_codes = threshold_codes
        # What this process selected before the load is no part of the run.
        self.refresher.last_refresh = self.refresher.last_decision = None
        self.refresher.load(mask_of)
        self.counters = counters

    # --- a step ---

    def observe(
        self,
        sub_group: int,
        gradient: Tensor | None,
        *,
        inverse_scale: float,
        rescale: float,
        exceptions: Mapping[str, Tensor | None],
        ema_decay: float,
    ) -> None:
        """Let one sub-group's gradient enter the importance of the step about to be applied, then unscale it.

        gradient       [numel] the flat partition: averaged, accumulated, unclipped, unmasked; mutated. None where
                       nothing of the sub-group was ever reduced
        inverse_scale  of the gradient, before it is squared
        rescale        multiplies the gradient in place
        exceptions     parameters whose part of ``gradient`` is not theirs in this window, by name: None for a gradient
                       of zero, or the gradient ([real_numel] or longer)
        ema_decay      weight of the old importance

        Raises RuntimeError where nothing is measured.
        """
        step = self.counters.observations
        stored = self._stored
        if stored is None:
            raise RuntimeError("there is no importance to observe with; call start_measuring() before")
        if gradient is not None and not exceptions:
            stored.observe_partition(
                sub_group, gradient, ema_decay=ema_decay, inverse_scale=inverse_scale, rescale=rescale, step=step
            )
            return
        for segment in self.layout.by_sub_group[sub_group]:
            if segment.name in exceptions:
                other = exceptions[segment.name]
                own = None if other is None else other[: segment.real_numel].to(self.placement.home_of(segment))
            else:
                own = None if gradient is None else gradient[segment.start : segment.stop]
            stored.observe(segment, own, ema_decay=ema_decay, inverse_scale=inverse_scale, step=step)
        if gradient is not None and rescale != 1.0:
            gradient.mul_(rescale)

    def count_observation(self, ema_decay: float) -> None:
        """Note that every sub-group's gradient has entered the importance, with the old importance's weight."""
        weight = ema_decay * self.counters.importance_weight + (1.0 - ema_decay)
        observations = self.counters.observations + 1
        self.counters = replace(self.counters, importance_weight=weight, observations=observations)

    def note_held_gradient_energy(self, share: float) -> None:
        """Note the share of the squared gradient that the mask holds back in the step about to be applied."""
        counters = self.counters
        self.counters = replace(
            counters, held_gradient_energy=counters.held_gradient_energy + share, held_steps=counters.held_steps + 1
        )

    def note_held_step_energy(self, share: float) -> None:
        """Note the share of a squared update that the mask held back, some time after the step."""
        counters = self.counters
        self.counters = replace(
            counters,
            held_step_energy=counters.held_step_energy + share,
            measured_steps=counters.measured_steps + 1,
        )

    def finish_step(self) -> RefreshReport | None:
        """Count an applied step and refresh the mask where one is due. Collective when it is."""
        step = self.counters.applied_steps + 1
        if self.observes:
            self.count_observation(self.config.ema_decay)
        self.counters = replace(
            self.counters,
            applied_steps=step,
            active_steps=self.counters.active_steps + self.is_active,
        )
        refresh = self._select(may_stay=True) if self._policy.refreshes(step) else None
        if self._stored is not None and not self._policy.observes(step + 1):
            self.stop_measuring()
        return refresh

    def finish_stage(self, name: str | None) -> RefreshReport | None:
        """Remember the importance of the stage that ends, and select the mask that the next one begins with.

        Collective. Nothing is remembered under ``memory: none``, and by a policy that measures nothing while it trains;
        a mask is selected then where the policy does so at the end of a stage. See `Remembered.keep`.
        """
        remembers = self.config.memory is not Memory.NONE and self._policy.observes(self.counters.applied_steps + 1)
        if remembers:
            self._keep(name)
        is_due = self.counters.applied_steps >= self.config.warmup_steps
        return self.refresh() if is_due and (remembers or self._policy.selects_at_stage_ends) else None

    def remember(self, name: str) -> RefreshReport | None:
        """Remember what was measured just now as a finished stage, and begin the importance of the run anew.

        Collective. Selects a mask where the policy selects masks, or has none yet; returns None where it does not.
        """
        self._keep(name)
        # Of the steps to come: what the losses of now gave would be taken for theirs.
        self._stored = None
        self.start_measuring()
        self.counters = replace(self.counters, observations=0, importance_weight=0.0)
        evolves = self.config.policy is PolicyName.EVOLVING
        is_due = evolves and self.counters.applied_steps >= self.config.warmup_steps
        refresh = self.refresh() if is_due or self.awaits_mask else None
        if not self.observes:
            self.stop_measuring()
        return refresh

    def _keep(self, name: str | None) -> None:
        """Take the importance in as that of a finished stage. Collective."""
        finished = self.counters.finished_stages
        self._remembered.keep(name, self._importance(), step=finished, exchange=self.exchange)
        # What is compared changes.
        self.refresher.last_row_codes = None
        self.counters = replace(self.counters, finished_stages=finished + 1)

    # --- a refresh ---

    def begin(self) -> RefreshReport | None:
        """Select the mask of the first step, where the policy has one. Collective then; see [Note: when]."""
        return self.refresh() if self._policy.selects_at_start else None

    def refresh(self) -> RefreshReport:
        """Select the mask from the importance as it is now. Collective; see [Note: when].

        Raises RuntimeError where nothing is measured.
        """
        refresh = self._select(may_stay=False)
        if refresh is None:
            raise RuntimeError("a selection that must not keep the mask kept it")
        return refresh

    def _select(self, *, may_stay: bool) -> RefreshReport | None:
        ranking = self._policy.ranking(self.placement, draw=self.counters.refreshes)
        measured = self._importance() if ranking is None else ranking
        refresh = self.refresher.refresh(
            measured, remembered=self._remembered, counters=self.counters, may_stay=may_stay
        )
        if refresh is not None:
            self.counters = self.counters.after_refresh()
        return refresh
