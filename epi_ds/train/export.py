"""Write the model of a ZeRO-3 engine in Hugging Face format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.verdict import on_first_rank


def export_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Gather the weights parameter by parameter and write safetensors, configuration and tokenizer. Collective.

    Rank 0 holds one copy of the weights in the precision ZeRO-3 trains in, on the CPU; the other ranks hold one
    parameter at a time. Raises RuntimeError rather than write an empty tensor, and what `write_export` raises.
    """
    model = engine.module
    weights: dict[str, torch.Tensor] = {}
    is_writer = dist.get_rank() == 0
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_writer:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if is_writer:
        weights.update(_persistent_buffers(model))
        empty = [name for name, value in weights.items() if value.numel() == 0]
        if empty:
            raise RuntimeError(
                f"refusing to export empty tensors: {', '.join(empty[:5])}; the weights were not gathered"
            )
    write_export(model, tokenizer, folder, weights=weights)


def write_export(model: Any, tokenizer: Any, folder: Path, *, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a model in Hugging Face format on rank 0, its tokenizer last, see `RunFolder.has_export`. Collective.

    weights  of the whole model, on rank 0

    Raises on all ranks where the files cannot be written: DiskError on rank 0, RemedyError on the others.
    """

    def write() -> None:
        with writing(folder):
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)

    on_first_rank(write)


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in model.state_dict().items()
        if name not in parameters
    }
