"""How ZeRO-3 cuts parameters into the partitions of this rank, read off its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from epi_ds.isolation.layout import Layout, Parameter, build_layout


def layout_of(
    optimizer: Any, *, layer: str | Mapping[str, str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Layout:
    """Return this rank's layout of the parameters of a ZeRO-3 optimizer; see `build_layout`."""
    sub_groups = [
        [Parameter(optimizer.param_names[parameter], tuple(parameter.ds_shape)) for parameter in group]
        for group in optimizer.fp16_groups
    ]
    group = optimizer.dp_process_group
    return build_layout(
        sub_groups,
        rank=dist.get_rank(group),
        world_size=dist.get_world_size(group),
        layer=layer,
        include=include,
        exclude=exclude,
    )
