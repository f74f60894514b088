"""What the overrides of mixin.py work with, and keep between two of their calls."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.accelerator import get_accelerator
from torch import Tensor

from epi_ds.anchor_config import AnchorConfig
from epi_ds.choices import Apply
from epi_ds.isolation.controller import IsolationController
from epi_ds.isolation.layout import Span
from epi_ds.zero3.anchor import Anchor
from epi_ds.zero3.geometry import layout_of
from epi_ds.zero3.moments import ClippingAverage
from epi_ds.zero3.skipped import SkippedSteps
from epi_ds.zero3.step_energy import StepEnergy
from epi_ds.zero3.window import AccumulationWindow


class Rescale(NamedTuple):
    """What the gradients of one step are multiplied by."""

    norm: Tensor
    """The norm of the step, kept so that no other can be taken for it."""
    factor: float


class IsolationContext:
    """What the overrides work with: the controller, the accumulation window and the optimizer's geometry."""

    def __init__(
        self, optimizer: Any, controller: IsolationController, *, newest_checkpoint: Callable[[], Path | None]
    ) -> None:
        """``newest_checkpoint`` is asked for the last one saved or loaded when too many steps were skipped."""
        self.controller = controller
        self.window = AccumulationWindow()
        self.masks_gradients = controller.config.apply is Apply.REDUCTION
        self.clipping: list[ClippingAverage] = []
        """One average per parameter group, for `apply: reduction`. See [Note: release] in moments.py."""
        if self.masks_gradients:
            self.clipping = [ClippingAverage(group["betas"][1]) for group in optimizer.optimizer.param_groups]
        self.skipped = SkippedSteps(controller.config.max_skipped_steps, newest_checkpoint=newest_checkpoint)
        self.backward_scale = 1.0
        """Loss scale of the gradients being applied; a dynamic scaler may raise its own before they are unscaled."""
        self.offloaded_sumsq: dict[Any, Tensor] = {}
        """With offload, the `masked_sumsq` of each gradient when it left the accelerator, by ZeRO-3's parameter id."""
        self.boundary_norm: Tensor | None = None
        """The norm of the gradient that is leaving the accelerator just now, where it is known already."""
        self.rescale: Rescale | None = None
        # Under `apply: reduction` the update of isolated entries is not what they would have moved by.
        self.step_energy = None if self.masks_gradients else StepEnergy(get_accelerator().current_device_name())
        config = controller.config.anchor
        self.anchor = None if config is None else _anchor_of(config, optimizer, controller)
        self.names: dict[Any, str] = dict(optimizer.param_names)
        # Of every trainable parameter: the controller's layout has the covered ones only.
        layout = layout_of(optimizer, layer="tensor")
        self.buffer_starts: list[int] = [0, *accumulate(layout.sub_group_numel)][:-1]
        """Offsets of the sub-groups in the accumulation buffer, which holds all partitions in order."""
        self.parameter_spans: list[list[tuple[Any, Span]]] = [
            [(p, Span(s.start, s.stop)) for p, s in zip(group, segments, strict=True) if s.real_numel]
            for group, segments in zip(optimizer.fp16_groups, layout.by_sub_group, strict=True)
        ]
        """Real entries of every trainable parameter in the flat partitions; empty ones left out."""


def _anchor_of(config: AnchorConfig, optimizer: Any, controller: IsolationController) -> Anchor:
    return Anchor(
        config,
        controller,
        num_entries=sum(parameter.ds_numel for group in optimizer.fp16_groups for parameter in group),
        dtype=optimizer.dtype,
    )
