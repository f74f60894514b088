"""Bit-exact resume with the Adams that step on the CPU: DeepSpeedCPUAdam, and FusedAdam where there is no accelerator.

Their C++ objects keep beta^t as a running product and are in no checkpoint: after a load they start from
``pow(beta, t)``, which rounds differently, so that plain DeepSpeed does not continue bit for bit. Replaying the step
count on a tensor of one entry rebuilds the product. FusedAdam's object is one per process: it is left wherever the last
engine took it.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from epi_ds.zero3.moments import state_age


def replay_steps(optimizer: Any) -> None:
    """Bring the bias correction of an Adam on the CPU to where its loaded states are. Leaves other optimizers alone."""
    states = [state for state in optimizer.state.values() if "exp_avg" in state]
    if not isinstance(optimizer, (DeepSpeedCPUAdam, FusedAdam)) or not states:
        return
    if states[0]["exp_avg"].device.type != "cpu":
        # FusedAdam's CUDA kernel has no memory.
        return
    if len({tuple(group["betas"]) for group in optimizer.param_groups}) > 1:
        # The object holds one product; groups that differ make it take the power at every change, run or resumed.
        return
    group = optimizer.param_groups[0]
    weight, gradient, first, second = torch.zeros(4, 1)
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    for step in range(1, max(state_age(state) for state in states) + 1):
        # Sub-groups that share a step, in whatever order, leave the product as the first one made it.
        if isinstance(optimizer, DeepSpeedCPUAdam):
            optimizer.ds_opt_adam.adam_update(
                optimizer.opt_id, step, lr, *betas, eps, decay, True, weight, gradient, first, second
            )
        else:
            tensors = [[gradient], [weight], [first], [second]]
            no_overflow = torch.zeros(1, dtype=torch.int32)
            optimizer.multi_tensor_adam(1, no_overflow, tensors, lr, *betas, eps, step, optimizer.adam_w_mode, 1, decay)
