"""The architectures people fine-tune: attach, three refreshes, audit, export, reload, equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.engines import ds_config, engine_of
from tests.support.ranks import run_ranks
from tests.support.tiers import slow_but

pytestmark = pytest.mark.zero3

VOCABULARY = 1024
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Architecture -> (configuration class, model class, changes).
BACKBONES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 16}),
}


def check_backbone(name: str, folder: str) -> dict[str, Any]:
    import transformers

    from epi_ds.data.skills import load_tokenizer
    from epi_ds.inspect.audit import audit
    from epi_ds.train.export import export_model

    config_class, model_class, changes = BACKBONES[name]
    config = getattr(transformers, config_class)(**{**COMMON, **changes})
    section = {"ratio": 0.1, "refresh_interval": 2, "ema_decay": 0.9}
    root = Path(folder)
    with engine_of(lambda: getattr(transformers, model_class)(config), ds_config(epi=section)) as engine:
        layers = [row.name for row in engine.epi.layers()]
        for step in range(7):
            generator = torch.Generator().manual_seed(7 * step + dist.get_rank())
            tokens = torch.randint(1, VOCABULARY, (2, 12), generator=generator)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            if step >= 5:
                engine.save_checkpoint(folder, tag=f"step{step + 1}")
        stats = engine.epi.stats()
        assert stats.counters.refreshes == 3
        assert stats.isolated > 0
        export_model(engine, load_tokenizer(), root / "export")
        engine.eval()
        probe = torch.arange(1, 13).unsqueeze(0)
        with torch.no_grad():
            logits = engine(input_ids=probe).logits
    report = audit([root])
    assert report.isolated > 0
    assert report.isolated_moved == 0
    assert report.plastic_moved > 0
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(root / "export").eval()
    with torch.no_grad():
        again = reloaded(input_ids=probe).logits
    return {"layers": layers, "equal": torch.equal(logits, again), "class": type(reloaded).__name__}


@pytest.mark.parametrize("name", slow_but(BACKBONES, "llama", "llama-tied", "qwen3", "gemma3"))
def test_backbone(name: str, tmp_path: Path) -> None:
    for result in run_ranks(check_backbone, 2, name, str(tmp_path)):
        assert result["class"] == BACKBONES[name][1]
        assert {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"} <= set(result["layers"])
        assert ("lm_head" in result["layers"]) == (name in {"llama", "mistral", "qwen2", "qwen3"})
        assert result["equal"]
