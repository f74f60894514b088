"""The anchor of one engine: what its flat partitions are pulled towards, and by how much in the step at hand.

[Note: pulled gradient] The gradient that ZeRO-3 shows its optimizer may outlive the step: with offload it is a buffer
of the host's, and without it may be a view of the accumulation buffer. A parameter that a later window does not use is
then stepped with what an earlier one left there, and a pull that was left there too would act twice. So where the
buffer lives on, the optimizer is shown a copy with the pull in it, which takes the room of one sub-group's gradient.
On the host the room is kept, that of the largest one: its pages, fresh in every step, took three times as long as all
else that an anchor does. The pass that pulls writes it. A device's allocator keeps such room by itself, for others too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epi_ds.anchor_config import STAGE, AnchorConfig
from epi_ds.checkpoint.weights_folder import WeightsFolder
from epi_ds.choices import AnchorDevice, AnchorWeight, Pull
from epi_ds.errors import UserError
from epi_ds.isolation.anchor.omega import omega_of
from epi_ds.isolation.anchor.pulling import Part, pulling
from epi_ds.isolation.anchor.scale import GradientScale
from epi_ds.isolation.anchor.strength import PullStrength
from epi_ds.isolation.anchor.values import AnchorValues, is_bf16
from epi_ds.isolation.controller import IsolationController
from epi_ds.isolation.importance.mean import Divided
from epi_ds.isolation.layout import Segment
from epi_ds.kernels import chunks
from epi_ds.zero3.anchor_folder import FolderAnchor
from epi_ds.zero3.moments import clipping_factor
from epi_ds.zero3.optimizer_state import stepping_optimizer


class Anchor:
    """Pulls the covered entries of an engine's partitions. See [Note: strength] in epi_ds/isolation/anchor."""

    def __init__(
        self,
        config: AnchorConfig,
        controller: IsolationController,
        *,
        num_entries: int,
        dtype: torch.dtype,
    ) -> None:
        """Take nothing yet: the weights may still be loaded.

        num_entries  that are trained, over all ranks
        dtype        of the model's parameters in the forward pass

        Raises UserError for a folder that does not hold the covered parameters.
        """
        self.config = config
        self.strength = PullStrength(config)
        self.scale = GradientScale()
        self.ended_stages = 0
        """By which an audit tells whether two checkpoints were pulled towards the same weights of a stage."""
        self._controller = controller
        self._placement = controller.placement
        self._values = AnchorValues(self._placement, config.device)
        self._omega: Divided | None = None
        self._omega_is_due = config.weight is AnchorWeight.IMPORTANCE
        self._num_entries = num_entries
        self._scale_of_step: GradientScale | None = None
        self.folder: FolderAnchor | None = None
        """What is pulled towards, where it lies in a folder."""
        if config.is_folder:
            self.folder = FolderAnchor(WeightsFolder(Path(config.to)), self._placement, dtype=dtype)
        self._host_room: Tensor | None = None
        """Room for a gradient. See [Note: pulled gradient]."""
        self._compared: set[int] = set()
        """With ``device: disk``, sub-groups that are known to have begun as the folder has them."""

    # --- a step ---

    def begin_step(self) -> None:
        """Look at what is remembered, where that has changed. Collective.

        Raises UserError where the strength has nothing to be divided by.
        """
        if not self.strength.is_planned:
            raise UserError(
                "anchor.strength is divided by the sum of the learning rates that the stage will have, and nobody has "
                "said it; call engine.epi.plan_stage([sum of the first parameter group, ...]) before the first step of "
                "every stage, or set anchor.decay, a pull per unit of learning rate"
            )
        if self._omega_is_due:
            remembered, layout = self._controller.remembered_importance(), self._placement.layout
            self._omega_is_due = False
            self._omega = None
            if remembered is not None:
                exchange = self._controller.exchange
                self._omega = omega_of(remembered, self.config.pull, layout=layout, exchange=exchange)

    @contextmanager
    def pulling(self, zero3: Any, sub_group: int) -> Iterator[None]:
        """Have the optimizer's step within the block pulled, isolated entries too: who holds them restores them.

        ``zero3`` is the ZeRO-3 optimizer, whose gradients of this sub-group are unscaled and clipped. Collective in the
        first step of what is pulled towards.
        """
        if not self.config.pulls:
            yield
            return
        weights = zero3.fp32_partitioned_groups_flat[sub_group]
        group = zero3.sub_group_to_group_id[sub_group]
        if not self._has(sub_group):
            self._take(sub_group, weights.data)
        if self.config.pull is Pull.UPDATE:
            yield
            rate = stepping_optimizer(zero3, sub_group).param_groups[group]["lr"]
            self._pull(sub_group, weights.data, weights.data, self.strength.per_rate(group) * rate)
        else:
            size = self.strength.per_rate(group) * self._scale(zero3).rms
            gradient = weights.grad
            if gradient is not None and self._acts(size):
                outlives = _outlives_step(zero3, gradient)
                weights.grad = self._room_for(gradient) if outlives else gradient
                self._pull(sub_group, weights.grad, weights.data, size, copied=gradient if outlives else None)
            try:
                yield
            finally:
                weights.grad = gradient

    def _room_for(self, gradient: Tensor) -> Tensor:
        """Return room for a copy that holds until the next one is made, as it was left. See [Note: pulled gradient]."""
        if gradient.device.type != "cpu":
            return torch.empty_like(gradient)
        if self._host_room is None or self._host_room.numel() < gradient.numel():
            # The smaller one first: never the room of both.
            self._host_room = None
            self._host_room = torch.empty_like(gradient)
        return self._host_room[: gradient.numel()]

    def in_gradient(self, zero3: Any, sub_group: int) -> Tensor | None:
        """Return what a step adds to the gradients of a flat partition, as of now; None where nothing is added.

        [numel] fp32, on the partition's device; isolated entries too.
        """
        group = zero3.sub_group_to_group_id[sub_group]
        size = self.strength.per_rate(group) * self.scale.rms
        if self.config.pull is not Pull.GRADIENT or not size or not self._has(sub_group):
            return None
        weights = zero3.fp32_partitioned_groups_flat[sub_group].data
        added = torch.zeros_like(weights)
        self._pull(sub_group, added, weights, size)
        return added

    def applied(self) -> None:
        """Note that the step was applied, on all sub-groups."""
        if self._scale_of_step is not None:
            self.scale, self._scale_of_step = self._scale_of_step, None

    def _scale(self, zero3: Any) -> GradientScale:
        """Return the size of the gradient with the step at hand in it; computed once a step."""
        if self._scale_of_step is None:
            norm = float(zero3._global_grad_norm)
            clipped = norm * clipping_factor(norm, zero3.clip_grad)
            self._scale_of_step = self.scale.after(clipped, self._num_entries - self._controller.isolated)
        return self._scale_of_step

    def _acts(self, size: float) -> bool:
        """Whether a pull of this size changes a bit: a factor of zero would still make a negative zero positive."""
        return size != 0.0 and (self._omega is not None or self.config.weight is AnchorWeight.UNIFORM)

    def _pull(
        self, sub_group: int, target: Tensor, weights: Tensor, size: float, *, copied: Tensor | None = None
    ) -> None:
        """Pull a tensor by the exponent of a decoupled pull, or the factor of one in the gradient, at omega 1.

        ``target`` becomes what ``copied`` would, where that is given.
        """
        if not self._acts(size):
            return
        sub_group_pull = pulling(self.config.pull, size, self._omega, sub_group=sub_group, placement=self._placement)
        end = 0
        for span in (self.folder if self.folder is not None and self._reads_disk else self._values).spans(sub_group):
            if copied is not None:
                # What no anchor covers lies between the spans, and behind them, such as padding.
                target[end : span.start].copy_(copied[end : span.start])
                end = span.stop
            for start, stop in chunks(span.start, span.stop):
                anchor = span.anchor[start - span.start : stop - span.start]
                source = None if copied is None else copied[start:stop]
                sub_group_pull.pull_(Part(start, target[start:stop], weights[start:stop], anchor, source))
        if copied is not None:
            target[end:].copy_(copied[end:])

    # --- what is pulled towards ---

    def end_stage(self) -> None:
        """Forget what belongs to a stage: its plan, and its weights where these are what is pulled towards."""
        self.strength.end_stage()
        self.ended_stages += 1
        self.remembered_more()
        if self.config.to == STAGE:
            self._values.forget()

    @property
    def _reads_disk(self) -> bool:
        return self.config.device is AnchorDevice.DISK

    def _has(self, sub_group: int) -> bool:
        return sub_group in self._compared if self._reads_disk else self._values.has(sub_group)

    def remembered_more(self) -> None:
        """Note that what is remembered has changed."""
        self._omega_is_due = self.config.weight is AnchorWeight.IMPORTANCE

    def _take(self, sub_group: int, weights: Tensor) -> None:
        """Keep the weights as they are now, or those of the folder. Collective."""
        if self.folder is None:
            self._keep(sub_group, self._values.packed(sub_group, weights))
        elif self._reads_disk:
            self._compare(self.folder, sub_group, weights)
        else:
            self._keep(sub_group, self.folder.packed(sub_group).to(weights.device))

    def _compare(self, folder: FolderAnchor, sub_group: int, weights: Tensor) -> None:
        """Raise UserError unless training begins with the folder's weights, on all ranks. Collective."""
        differing = folder.differing(sub_group, weights)
        if int(self._controller.exchange.maximum(torch.tensor([len(differing)], dtype=torch.int64))):
            shown = ", ".join(differing[:3]) or "some of another rank's"
            raise UserError(
                f"anchor.device: disk reads the weights that training begins with from {self.config.to}, and they are "
                f"not these: {shown}; give the folder that the model was loaded from, or another device"
            )
        self._compared.add(sub_group)

    def _keep(self, sub_group: int, packed: Tensor) -> None:
        # In the same bytes on all ranks, so that a checkpoint of them can be dealt out to others.
        is_wide = self._controller.exchange.maximum(torch.tensor([not is_bf16(packed)], dtype=torch.int64))
        self._values.take(sub_group, packed, narrow=not int(is_wide))

    def restore(self, sub_group: int, packed: Tensor) -> None:
        """Replace what a sub-group is pulled towards by its covered entries, packed, fp32. Collective."""
        self._keep(sub_group, packed.to(self._placement.devices[sub_group]))

    def restart(self) -> None:
        """Forget what is pulled towards: the weights before the next step are taken, or the folder's."""
        self._values.forget()
        self.remembered_more()

    def continues_with_folder(self) -> None:
        """Note that a load found the folder to be that of before; the weights have moved on from it since."""
        self._compared.update(range(len(self._placement.devices)))

    @property
    def is_taken(self) -> bool:
        """Whether there is anything to save, which a folder has already; the same on every rank."""
        return self.folder is None and all(
            self._values.has(sub_group) for sub_group in range(len(self._placement.devices))
        )

    def of(self, segment: Segment) -> Tensor:
        """Return what one parameter's slice is pulled towards. [real_numel] fp32 or bf16, not to be written to."""
        return self._values.of(segment) if self.folder is None else self.folder.of(segment)

    @property
    def num_bytes(self) -> int:
        """Bytes on this rank that outlive a step."""
        return self._values.num_bytes


def _outlives_step(zero3: Any, gradient: Tensor) -> bool:
    """Whether a gradient lies where a later step may find it. See [Note: pulled gradient]."""
    buffer = zero3.grad_partitions_flat_buffer
    return bool(zero3.offload_optimizer or gradient.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr())
