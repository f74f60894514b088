"""The overrides through which isolation acts inside DeepSpeed's ZeRO-3 optimizer.

[Note: step] What happens in one optimizer step, and where this mixin stands in it:

    backward     partition_grads          records which parameters were reduced
                 _offload_grad_...        with offload: the sums of squares of all entries and of those that will move
                 _constant_buffered_norm2     and the first of these is ZeRO-3's own norm
    step         _get_norm_groups         the norm is over the entries that will move; whether to skip is plain ZeRO-3's
    sub-group    unscale_and_clip_grads   the commit point: importance observes the raw gradient, in the same pass
                 _optimizer_step          an anchor pulls, in the clipped gradient or after the update; isolated weights
                                          keep their bits all the same, and no momentum builds up behind them
    end          step                     counts the step and refreshes the mask where one is due

A skipped step never reaches the commit point, so it leaves no trace. The class is assigned to an optimizer that exists
(attach.py); tests/zero3/test_contract.py pins every overridden name and signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

from epi_ds.isolation.importance.views import ReadPartition
from epi_ds.isolation.layout import Span, merge_spans
from epi_ds.kernels import hold, mask_, masked_sumsq, restore_
from epi_ds.zero3.context import IsolationContext, Rescale
from epi_ds.zero3.moments import STEADY, clipping_factor, reset_moments, set_moments, state_age
from epi_ds.zero3.optimizer_state import optimizer_state, stepping_optimizer
from epi_ds.zero3.step_energy import UpdateSample

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero3Optimizer
else:
    # A mixin: the class it is mixed over is the optimizer's own. guard.py refuses subclasses of it.
    Zero3Optimizer = object


# A sum of squares below which no precision that a norm is taken in can overflow, so plain ZeRO-3 would not skip.
_CERTAINLY_VALID = 1e37


class IsolationMixin(Zero3Optimizer):
    """Mixed over ``DeepSpeedZeroOptimizer_Stage3``; ``_epi_context`` is set when the class is assigned."""

    _epi_context: IsolationContext

    # --- overrides, in the order in which a step reaches them ---

    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> Any:
        """Record the reduced parameters. See [Note: stale gradients] in window.py."""
        is_copied_out = bool(self.offload_optimizer and self.is_gradient_accumulation_boundary())
        for parameter, partition in zip(params_to_release, grad_partitions):  # noqa: B905 - as ZeRO-3 pairs them
            self._epi_context.window.record(
                parameter, partition, buffer_is_stale=self.micro_step_id != 0, is_copied_out=is_copied_out
            )
        return super().partition_grads(params_to_release, grad_partitions)

    def _offload_grad_partition_at_boundary(
        self,
        param: Any,
        grad_buffer: Tensor,
        offload_fp32_gradients: dict[int, list[Tensor]],
        offload_fp32_offsets: dict[int, list[int]],
    ) -> None:
        """Take the masked norm of a parameter where ZeRO-3 takes its norm: afterwards NVMe may have the gradient."""
        context = self._epi_context
        if context.controller.is_active:
            param_id = self.get_param_id(param)
            sub_group, start, _ = self.grad_position[param_id]
            # Moved as bits, an eighth of what the mask would be.
            bits = context.controller.masks.bits[sub_group][start // 8 : -(-(start + grad_buffer.numel()) // 8)]
            sums = masked_sumsq(grad_buffer, bits.to(grad_buffer.device), first_entry=start % 8)
            context.offloaded_sumsq[param_id] = sums
            context.boundary_norm = sums[0].sqrt()
        try:
            super()._offload_grad_partition_at_boundary(
                param, grad_buffer, offload_fp32_gradients, offload_fp32_offsets
            )
        finally:
            context.boundary_norm = None

    def _constant_buffered_norm2(self, input: Tensor, buffer_size: int = 250000000) -> Tensor:  # noqa: A002
        """Return the norm of a gradient at the boundary without reading it again: the masked one's pass took it too."""
        norm = self._epi_context.boundary_norm
        return super()._constant_buffered_norm2(input, buffer_size) if norm is None else norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the open window along with its gradients."""
        self._epi_context.window.discard()
        super().zero_grad(set_to_none=set_to_none)

    def step(self, closure: Any = None) -> None:
        """Step, then count it and refresh the mask where due. Collective.

        Raises RemedyError where no step could be applied for too long, and RuntimeError where a probe is still due.
        """
        context = self._epi_context
        if context.controller.awaits_mask:
            steps = context.controller.config.probe_steps
            source, call = (f"probe_steps: {steps}", "probe(...)") if steps else ("memory", "remember(...)")
            raise RuntimeError(
                f"policy: static with {source} has no mask yet, so this step would isolate nothing; call "
                f"engine.epi.{call} before the first step"
            )
        if context.anchor is not None:
            context.anchor.begin_step()
        context.window.close()
        context.backward_scale = float(self.loss_scale)
        suspects = list(self._epi_not_finite()) if context.skipped.next_is_too_many else []
        super().step(closure)
        context.window.forget()
        context.offloaded_sumsq.clear()
        if self.overflow:
            context.skipped.skipped(
                suspects,
                num_parameters=len(context.names),
                loss_scale=context.backward_scale,
            )
            return
        context.skipped.applied()
        if context.anchor is not None:
            context.anchor.applied()
        if context.clipping:
            rescale = context.backward_scale / float(self.loss_scale)
            factor = rescale * clipping_factor(float(self._global_grad_norm), self.clip_grad)
            for average in context.clipping:
                average.observe(factor)
        context.controller.finish_step()

    def _get_norm_groups(self) -> list[Tensor]:
        """Return the norms over the entries that will move. Collective.

        A step that plain ZeRO-3 would skip gets plain ZeRO-3's norms: a NaN in an isolated entry is still a NaN.
        """
        context = self._epi_context
        if not context.controller.is_active:
            return super()._get_norm_groups()
        squares = torch.stack([self._epi_sums_of_squares(sub_group) for sub_group in range(len(self.fp16_groups))])
        # A collective of its own would cost as much as the norm; and it is sent also where there is nothing to say: a
        # longer vector may be summed in another order, to other bits.
        energy = context.step_energy
        sent = squares.flatten() if energy is None else torch.cat([squares.flatten(), energy.pending])
        dist.all_reduce(sent, group=self.dp_process_group)
        # One look at the device for all that is decided and noted here.
        on_host = sent.cpu()
        whole, plastic = on_host[: squares.numel()].view_as(squares).sum(dim=0).tolist()
        if not whole < _CERTAINLY_VALID:
            plain = super()._get_norm_groups()
            if is_invalid_grad_norm(combine_grad_norm_groups(plain)):
                return plain
        if energy is not None:
            energy.settle()
            self._epi_note_step_energy(on_host[squares.numel() :])
        if whole > 0:
            context.controller.note_held_gradient_energy(1.0 - plastic / whole)
        # As plain ZeRO-3 returns them.
        norms = sent[: squares.numel()].view_as(squares)[:, 1].sqrt()
        return list(norms.float().cpu() if self.offload_optimizer else norms.to(get_norm_dtype()))

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """Observe the raw gradient of a sub-group, and unscale and clip it in the same pass."""
        controller = self._epi_context.controller
        if controller.observes and self.fp32_partitioned_groups_flat[sub_group_id].grad is not None:
            rescale = self._epi_rescale(total_norm)
            self._epi_observe(sub_group_id, ema_decay=controller.config.ema_decay, rescale=rescale)
        else:
            super().unscale_and_clip_grads(sub_group_id, total_norm)

    def _optimizer_step(self, sub_group_id: int) -> None:
        """Update a sub-group, its isolated weights excepted."""
        context, controller = self._epi_context, self._epi_context.controller
        if not controller.is_active:
            self._epi_pulled_step(sub_group_id)
            return
        bits = controller.masks.bits[sub_group_id]
        weights = self.fp32_partitioned_groups_flat[sub_group_id]
        energy, sample = context.step_energy, None
        if energy is not None:
            spans = merge_spans(span for _, span in context.parameter_spans[sub_group_id])
            sample = UpdateSample(weights.data, bits, spans=spans, step=controller.counters.applied_steps)
        isolated_here = controller.masks.isolated_here[sub_group_id]
        held = hold(weights.data, bits, isolated_here) if isolated_here else None
        self._epi_pulled_step(sub_group_id)
        if energy is not None and sample is not None:
            energy.add(sample.energies(weights.data))
        if held is None:
            return
        restore_(weights.data, bits, held)
        if context.masks_gradients:
            # What zero gradients would have left there; see [Note: release] in moments.py.
            mask_(stepping_optimizer(self, sub_group_id).state[weights]["exp_avg"], bits)

    # --- what the overrides are made of ---

    def _epi_pulled_step(self, sub_group_id: int) -> None:
        """Update all weights of a sub-group, pulled where there is an anchor."""
        context = self._epi_context
        if context.anchor is None:
            super()._optimizer_step(sub_group_id)
            return
        with context.anchor.pulling(self, sub_group_id):
            super()._optimizer_step(sub_group_id)

    def _epi_not_finite(self) -> Iterator[str]:
        """Yield the parameters of which this rank's accumulated gradient is not finite."""
        context = self._epi_context
        for sub_group_id, spans in enumerate(context.parameter_spans):
            for parameter, span in spans:
                if not self._epi_accumulated(sub_group_id, span).isfinite().all():
                    yield context.names[parameter]

    def _epi_rescale(self, total_norm: Tensor) -> float:
        """Return what plain ZeRO-3 multiplies the gradients of this step by to unscale and clip them."""
        context = self._epi_context
        if context.rescale is None or context.rescale.norm is not total_norm:
            # Asked once a step: on an accelerator every answer waits for all that was started before.
            combined_scale = self.loss_scale
            if self.clip_grad > 0.0:
                clip = ((total_norm / self.loss_scale) + 1e-6) / self.clip_grad
                combined_scale = torch.clamp(clip, min=1.0) * self.loss_scale
            context.rescale = Rescale(total_norm, float(1.0 / combined_scale))
        return context.rescale.factor

    def _epi_note_step_energy(self, energies: Tensor) -> None:
        held, whole = energies.tolist()
        if whole > 0:
            self._epi_context.controller.note_held_step_energy(held / whole)

    def _epi_was_copied_out(self, parameter: Any) -> bool:
        """Whether, with offload, the optimizer's own gradient is of this window.

        The sum leaves the accelerator at the accumulation boundary only: what that micro-batch did not use is stale.
        """
        return self.get_param_id(parameter) in self.norm_for_param_grads

    def _epi_accumulated(self, sub_group_id: int, span: Span) -> Tensor:
        """Return a view of the accumulation buffer. ``span`` is in the sub-group's flat partition."""
        start = self._epi_context.buffer_starts[sub_group_id] + span.start
        return self.grad_partitions_flat_buffer.narrow(0, start, span.stop - span.start)

    def _epi_observe(self, sub_group_id: int, *, ema_decay: float, rescale: float = 1.0) -> None:
        context = self._epi_context
        exceptions: dict[str, Tensor | None] = {}
        for parameter, span in context.parameter_spans[sub_group_id]:
            name = context.names[parameter]
            if not context.window.was_reduced(parameter):
                exceptions[name] = None
            elif (own := context.window.own_gradient(parameter)) is not None:
                exceptions[name] = own
            elif self.offload_optimizer and not self._epi_was_copied_out(parameter):
                exceptions[name] = self._epi_accumulated(sub_group_id, span)
        context.controller.observe(
            sub_group_id,
            self.fp32_partitioned_groups_flat[sub_group_id].grad,
            inverse_scale=1.0 / context.backward_scale,
            rescale=rescale,
            exceptions=exceptions,
            ema_decay=ema_decay,
        )

    def _epi_sums_of_squares(self, sub_group_id: int) -> Tensor:
        """Sums over this rank's entries of the gradients that plain ZeRO-3's norm is taken over: all, and plastic ones.

        [2] fp64, on the accelerator.
        """
        context = self._epi_context
        total = torch.zeros(2, dtype=torch.float64, device=get_accelerator().current_device_name())
        spans = context.parameter_spans[sub_group_id]
        if self.offload_optimizer:
            for parameter, _ in spans:
                if self._epi_was_copied_out(parameter):
                    param_id = self.get_param_id(parameter)
                    if param_id in context.offloaded_sumsq:
                        total += context.offloaded_sumsq[param_id]
                    else:
                        # Without a mask at that time, a refresh out of turn put one in force since: all entries count.
                        total += self.norm_for_param_grads[param_id].double() ** 2
            return total
        gradient = self._epi_accumulated(sub_group_id, Span(0, self.fp16_partitioned_groups_flat_numel[sub_group_id]))
        bits = context.controller.masks.bits[sub_group_id]
        for start, stop in merge_spans(span for _, span in spans):
            total += masked_sumsq(gradient[start:stop], bits, first_entry=start)
        return total

    # --- called from outside a step ---

    def _epi_mask_changes(self, sub_group: int, *, before: Tensor, now: Tensor, importance: ReadPartition) -> None:
        """Set the moments of what is isolated or released. See [Note: release] in moments.py."""
        context = self._epi_context
        if torch.equal(before, now):
            return
        param_group = self.sub_group_to_group_id[sub_group]
        beta2 = self.optimizer.param_groups[param_group]["betas"][1]
        released, weight = before & ~now, context.controller.counters.importance_weight
        with optimizer_state(self, sub_group) as state:
            pull = None
            if context.anchor is not None and released.any():
                pull = context.anchor.in_gradient(self, sub_group)
            optimizer_weight = 1.0 - beta2 ** state_age(state)
            if context.masks_gradients:
                scale = context.clipping[param_group].corrected * optimizer_weight / weight if weight else 0.0
                pull = None if pull is None else pull.mul_((STEADY * optimizer_weight) ** 0.5)
                read = importance if weight else None
                set_moments(state, before=before, now=now, importance=read, importance_scale=scale, pull=pull)
            elif pull is not None:
                # What is released, and nothing else: the second moment has tracked all of it, the pull once.
                pull.mul_(((STEADY - 1.0) * optimizer_weight) ** 0.5)
                none = torch.zeros_like(released)
                set_moments(state, before=released, now=none, importance=None, importance_scale=0.0, pull=pull)

    def _epi_settle_step_energy(self) -> None:
        """Note what the last update was, before the counters are saved. Collective."""
        energy = self._epi_context.step_energy
        if energy is not None:
            sent = energy.pending.clone()
            energy.settle()
            dist.all_reduce(sent, group=self.dp_process_group)
            self._epi_note_step_energy(sent)

    def _epi_stale_parameters(self) -> list[str]:
        """Return the parameters of which a later step may apply an old gradient. See [Note: leftovers] in window.py."""
        context = self._epi_context
        return [
            context.names[parameter]
            for group in self.fp16_groups
            for parameter in group
            if context.window.has_leftover(parameter)
        ]

    @property
    def _epi_has_unsaved_moments(self) -> bool:
        """Whether moments live in the second optimizer of partial offload, which DeepSpeed's checkpoints leave out."""
        sub_groups = range(len(self.fp16_groups))
        return any(stepping_optimizer(self, sub_group) is not self.optimizer for sub_group in sub_groups)

    def _epi_reset_optimizer_state(self) -> None:
        """Return the optimizer to the state of one that has taken no step, for the next stage of a run."""
        for sub_group in range(len(self.fp16_groups)):
            with optimizer_state(self, sub_group) as state:
                reset_moments(state)
        for average in self._epi_context.clipping:
            average.reset()
