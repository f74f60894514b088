"""Write the model of a ZeRO-3 engine in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


def export_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Gather the weights parameter by parameter and write safetensors, configuration and tokenizer. Collective.

    Rank 0 holds one copy of the weights in the precision ZeRO-3 trains in, on the CPU; the other ranks hold one
    parameter at a time. Raises RuntimeError rather than write an empty tensor.
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
        model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in model.state_dict().items()
        if name not in parameters
    }
