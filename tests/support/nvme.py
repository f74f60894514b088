"""NVMe offload on whatever disk the test's folder is on: a model large enough for ZeRO-3 to swap some of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

needs_libaio = pytest.mark.skipif(
    not Path("/usr/include/libaio.h").is_file(), reason="the headers of libaio are missing (apt-get install libaio-dev)"
)


class WideNet(nn.Module):
    """On two ranks, the sub-group of the widest weight is of 1 MiB, which is the least that ZeRO-3 swaps.

    Its gradient is no multiple of the 1 KiB that a disk is written by, so that a rest of it stays in memory. The weight
    comes first in its sub-group: behind 513 entries of a bias, plain DeepSpeed 0.19.8 trains other weights with NVMe
    than with CPU offload.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 13)
        self.blocks = nn.ModuleList([nn.Linear(13, 1025, bias=False), nn.Linear(1025, 513), nn.Linear(513, 3)])

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return ((hidden.sum(-1) - target) ** 2).mean()


class WideHeads(nn.Module):
    """A trunk and two heads of which a call uses one. As sub-groups of their own, the weights of both are swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(7, 1025)
        self.heads = nn.ModuleList([nn.Linear(1025, 513), nn.Linear(1025, 513)])

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        return (self.heads[head](torch.tanh(self.trunk(inputs))) ** 2).mean()


def nvme(folder: str, *, parameters: str = "none", pipeline: bool = False) -> dict[str, Any]:
    """Changes for `ds_config`: optimizer states on a disk, parameters where ``parameters`` says."""
    zero: dict[str, Any] = {
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": folder,
            "pin_memory": False,
            "pipeline_read": pipeline,
            "pipeline_write": pipeline,
        },
        # Several sub-groups, of which one is swapped.
        "sub_group_size": 1000,
    }
    if parameters == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    elif parameters == "nvme":
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": folder,
            "pin_memory": False,
            "buffer_count": 10,
            "buffer_size": 1_000_000,
            "max_in_cpu": 0,
        }
    return {"zero_optimization": zero}


def on_host() -> dict[str, Any]:
    """Changes for `ds_config`: the same sub-groups, in the host's memory."""
    return {"offload": True, "zero_optimization": {"sub_group_size": 1000}}
