"""``model.lora``: an adapter on weights that ZeRO-3 has cut, and what its export is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from epi_ds.data.skills import load_tokenizer
from epi_ds.errors import UserError
from epi_ds.recipe.lora import LoraSection
from epi_ds.train.adapter import export_adapter, with_adapter
from tests.support.engines import ds_config, engine_of
from tests.support.ranks import run_ranks
from tests.zero3.test_models import SIZES, _section, _train_language_model

pytestmark = [pytest.mark.zero3, pytest.mark.slow]

LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "up_proj", "embed_tokens"],
    "use_rslora": True,
}


def _base() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _adapted() -> nn.Module:
    base = _base()
    # What was drawn before decides nothing.
    torch.rand(3)
    return with_adapter(base, LoraSection(**LORA), seed=5)


def export(folder: str) -> None:
    base = _base()
    with pytest.raises(UserError, match=r"model\.lora: .*nothing.* not found"):
        with_adapter(_base(), LoraSection(target_modules=["nothing"]), seed=0)
    with pytest.raises(UserError, match="has the head of the model"):
        with_adapter(_base(), LoraSection(target_modules=["lm_head"]), seed=0)
    with engine_of(_adapted, ds_config(epi=_section(), accumulation=2)) as engine:
        for step in range(3):
            _train_language_model(engine, step)
        for merge in (True, False):
            export_adapter(engine, load_tokenizer(), Path(folder) / str(merge), merge=merge)
    if dist.get_rank() == 0:
        base.save_pretrained(Path(folder) / "base")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_merged_export_is_the_base_with_the_adapter_on_it(tmp_path: Path, world_size: int) -> None:
    from peft import PeftModel

    run_ranks(export, world_size, str(tmp_path))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "True").state_dict()
    expected = PeftModel.from_pretrained(base, tmp_path / "False").merge_and_unload().state_dict()
    assert merged.keys() == expected.keys() == before.keys()
    for name, value in merged.items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name
        assert torch.equal(value, before[name]) != any(target in name for target in LORA["target_modules"]), name
    assert (tmp_path / "True" / "tokenizer.json").is_file()
    assert not list((tmp_path / "False").glob("model*"))
