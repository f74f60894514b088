"""Bit-exact resume with DeepSpeedCPUAdam.

Its C++ object keeps beta^t as a running product and is in no checkpoint: after a load it starts from ``pow(beta, t)``,
which rounds differently, so that plain DeepSpeed does not continue bit for bit. Replaying the step count on a tensor of
one entry rebuilds the product.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from epi_ds.zero3.moments import state_age


def replay_steps(optimizer: Any) -> None:
    """Bring a DeepSpeedCPUAdam's bias correction to where its loaded states are. Leaves other optimizers alone."""
    if not isinstance(optimizer, DeepSpeedCPUAdam) or not optimizer.state:
        return
    if len({tuple(group["betas"]) for group in optimizer.param_groups}) > 1:
        # The object holds one product; groups that differ make it take the power at every change, run or resumed.
        return
    group = optimizer.param_groups[0]
    age = max(state_age(state) for state in optimizer.state.values())
    weight, gradient, first, second = torch.zeros(4, 1)
    for step in range(1, age + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id,
            step,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["bias_correction"],
            weight,
            gradient,
            first,
            second,
        )
