"""The engine that is measured: plain ZeRO-3 in fp32 over a small Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from epi_ds.checkpoint.weights_folder import SINGLE

_VOCABULARY = 8009
_BATCH, _LENGTH = 2, 257


def tokens_of_a_step() -> torch.Tensor:
    """Return random tokens, of shape [rows, length]."""
    return torch.randint(0, _VOCABULARY, (_BATCH, _LENGTH))


def bench_engine(*, offload: bool, layers: int) -> Any:
    """Make the engine. Collective."""
    torch.manual_seed(0)
    # 1.9 million parameters a layer and 6.7 million of embeddings; no size is a power of two.
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=416,
        intermediate_size=1112,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=_LENGTH,
        attn_implementation="sdpa",
    )
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    ds_config = {
        "train_micro_batch_size_per_gpu": _BATCH,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=LlamaForCausalLM(config), config=ds_config)[0]


def save_weights(engine: Any, folder: Path) -> None:
    """Save the weights as they are now to a new folder, as a model is saved. Collective."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        if dist.get_rank() == 0:
            folder.mkdir()
            weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
            save_file(weights, folder / SINGLE)
    dist.barrier()
