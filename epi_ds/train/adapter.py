"""A low-rank adapter on a model whose weights ZeRO-3 has cut: how it is made, and how it is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn
from transformers import set_seed

from epi_ds.errors import UserError
from epi_ds.recipe.lora import LoraSection, lora_config
from epi_ds.train.export import write_export

# What PEFT puts before the names of a model's parameters, and after that of a module with an adapter.
_PREFIX = "base_model.model."
_WRAPPED = ".base_layer."
_ADAPTER = "default"


def with_adapter(model: Any, section: LoraSection, *, seed: int) -> Any:
    """Return the model with an adapter whose weights alone are trained. The model is changed in place.

    seed  what the adapter's first weights are drawn from: the same on all ranks, whatever was drawn before

    Raises UserError for modules that the model does not have, and for an adapter on its head, which TRL would ignore.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    set_seed(seed)
    try:
        adapted = get_peft_model(model, lora_config(section.settings))
    except ValueError as error:
        raise UserError(f"model.lora: {str(error).splitlines()[0]}") from error
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "model.lora: target_modules has the head of the model, which TRL multiplies by itself, so that its adapter "
            "would never be trained; leave it out"
        )
    return adapted


def export_adapter(engine: Any, tokenizer: Any, folder: Path, *, merge: bool) -> None:
    """Write the model with the adapter added to its weights, or the adapter alone, in Hugging Face format. Collective.

    Rank 0 holds one copy of what is written, on the CPU; the other ranks hold one module at a time. Raises what
    `write_export` raises.
    """
    model, is_writer = engine.module, dist.get_rank() == 0
    if merge:
        weights, written = _merged_weights(model, keep=is_writer), model.get_base_model()
    else:
        weights, written = {}, model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter]):
                    if is_writer:
                        weights[name] = parameter.detach().to("cpu", copy=True)
    write_export(written, tokenizer, folder, weights=weights)


def _merged_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return the weights and persistent buffers of the model below an adapter, with it added. Collective.

    keep  whether this rank wants them; the others get none
    """
    from peft.tuners.lora import LoraLayer

    weights: dict[str, Tensor] = {}
    # LoraLayer is mixed over modules, and no module by itself.
    adapted: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            if keep:
                weight = module.get_base_layer().weight
                # Added in fp32 and rounded once, whatever the two are kept in.
                total = weight.detach().float() + module.get_delta_weight(_ADAPTER).detach().float()
                weights[f"{name.removeprefix(_PREFIX)}.weight"] = total.to("cpu", weight.dtype)
    known = set(weights) if keep else {f"{name.removeprefix(_PREFIX)}.weight" for name in adapted}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        plain = name.removeprefix(_PREFIX).replace(_WRAPPED, ".")
        if plain in known or ".lora_" in name:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                weights[plain] = parameter.detach().to("cpu", copy=True)
    if keep:
        buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
        weights |= {name.removeprefix(_PREFIX): value.detach().to("cpu", copy=True) for name, value in buffers.items()}
    return weights
