"""Models of which a window uses only a part, or of which only a part is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from tests.support.engines import (
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, odd_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

DECAY = 0.5
INTERVAL = 2
VOCABULARY = 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def _section(**changes: Any) -> dict[str, Any]:
    # Per layer, so that every tensor has isolated entries, whatever its scale.
    section = {"ratio": 0.2, "refresh_interval": INTERVAL, "ema_decay": DECAY, "selection": "per_layer"}
    return section | {"layer": "tensor"} | changes


def _tokens(step: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * dist.get_rank() + micro_batch)
    return torch.randint(1, VOCABULARY, (2, 8), generator=generator)


def _train_language_model(engine: Any, step: int) -> None:
    for micro_batch in range(engine.gradient_accumulation_steps()):
        tokens = _tokens(step, micro_batch)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()


def _assert_held(before: dict[str, Tensor], after: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    assert all(mask.any() for name, mask in masks.items() if mask.numel() > 1 / 0.2), masks
    for name, mask in masks.items():
        assert torch.equal(before[name].view(torch.int32)[mask], after[name].view(torch.int32)[mask]), name
    assert any(not torch.equal(before[name][~mask], after[name][~mask]) for name, mask in masks.items())


# --- mixtures of experts ---


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def _choose_first_experts(module: nn.Module, inputs: tuple[Any, ...], routed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Send every token to the experts 0 and 1."""
    logits, scores, indices = routed
    return logits, scores, torch.arange(2).expand_as(indices)


def check_mixtral() -> None:
    """All experts of a transformers model lie in one parameter. Two of four are used in the first window only."""
    with engine_of(mixtral, ds_config(epi=_section(), accumulation=2)) as engine:
        experts = [name for name in engine.epi.parameter_names if ".experts." in name]
        assert len(experts) == 4
        isolated_and_unused = 0
        for step in range(3 * INTERVAL):
            if step == INTERVAL:
                for layer in engine.module.model.layers:
                    layer.mlp.gate.register_forward_hook(_choose_first_experts)
            masks, before, old = full_masks(engine), full_weights(engine), full_importance(engine)
            _train_language_model(engine, step)
            if step < INTERVAL:
                continue
            _assert_held(before, full_weights(engine), masks)
            now = full_importance(engine)
            for name in experts:
                assert old[name][2:].any(), "used in the first window"
                assert torch.equal(now[name][2:], old[name][2:] * DECAY), name
                assert not torch.equal(now[name][:2], old[name][:2] * DECAY), name
                isolated_and_unused += int(masks[name][2:].sum())
        assert isolated_and_unused > 0


def test_unused_experts_of_mixtral_only_decay() -> None:
    run_ranks(check_mixtral, 2)


class Experts(nn.Module):
    """Experts as modules of their own. ZeRO-3 must gather them together: ranks use different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))

    def forward(self, hidden: Tensor, chosen: list[int]) -> Tensor:
        return sum((torch.tanh(self.experts[index](hidden)) for index in chosen), hidden)


class MixtureNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(7, 7)
        self.mixture = Experts()
        self.head = nn.Linear(7, 3)

    def forward(self, inputs: Tensor, chosen: list[int]) -> Tensor:
        return (self.head(self.mixture(self.trunk(inputs), chosen)) ** 2).mean()


def mixture() -> nn.Module:
    model = MixtureNet()
    set_z3_leaf_modules(model, [Experts])
    return model


def mixture_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, list[int]]:
    """Every rank and micro-batch chooses one expert; after the first window, nobody the last one."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * rank + micro_batch)
    choices = 4 if step < INTERVAL else 3
    return torch.randn(4, 7, generator=generator), [(step + rank + micro_batch) % choices]


def check_leaf_experts(changes: dict[str, Any]) -> None:
    with engine_of(mixture, ds_config(epi=_section(), accumulation=4, **changes)) as engine:
        last = [name for name in engine.epi.parameter_names if ".experts.3." in name]
        for step in range(3 * INTERVAL):
            masks, before, old = full_masks(engine), full_weights(engine), full_importance(engine)
            train_step(engine, step, mixture_batch)
            if step < INTERVAL:
                continue
            _assert_held(before, full_weights(engine), masks)
            now = full_importance(engine)
            for name in engine.epi.parameter_names:
                assert old[name].any()
                assert torch.equal(now[name], old[name] * DECAY) == (name in last), name


@pytest.mark.parametrize("changes", [{}, {"offload": True}], ids=["device", "offload"])
def test_unused_experts_of_a_leaf_module_only_decay(changes: dict[str, Any]) -> None:
    run_ranks(check_leaf_experts, 2, changes)


# --- frozen parameters ---


def adapted_llama() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def check_adapter(folder: str) -> list[str]:
    """Train, save after 5 steps, train on; then resume. Return what was logged when isolation was attached."""
    config = ds_config(epi=_section(), accumulation=2)
    states = []
    with collected_logs() as messages, engine_of(adapted_llama, config) as engine:
        logged = list(messages)
        trainable = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        assert set(engine.epi.parameter_names) == trainable
        assert len(trainable) == 8
        assert all("lora_" in name for name in trainable)
        frozen = {n: p.ds_tensor.clone() for n, p in engine.module.named_parameters() if n not in trainable}
        for step in range(7):
            masks, before = full_masks(engine), full_weights(engine)
            _train_language_model(engine, step)
            if step >= INTERVAL:
                _assert_held(before, full_weights(engine), masks)
            if step == 4:
                engine.save_checkpoint(folder)
        for name, parameter in engine.module.named_parameters():
            if name in frozen:
                assert torch.equal(parameter.ds_tensor, frozen[name]), name
        assert {row.name.split(".lora_")[0] for row in engine.epi.layers()} == {
            f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            for layer in range(2)
            for projection in ("q_proj", "v_proj")
        }
        states.append((full_weights(engine), full_importance(engine), full_masks(engine)))
    with engine_of(adapted_llama, config) as engine:
        engine.load_checkpoint(folder)
        for step in range(5, 7):
            _train_language_model(engine, step)
        states.append((full_weights(engine), full_importance(engine), full_masks(engine)))
    for ours, theirs in zip(*states, strict=True):
        assert_same(ours, theirs)
    return logged


def test_an_adapter_alone_is_covered_and_that_is_said_once(tmp_path: Path) -> None:
    first, second = run_ranks(check_adapter, 2, str(tmp_path))
    assert [text for text in first if "frozen" in text] == [
        "21 parameters with 5456 entries are frozen and keep their values anyway; isolation protects only the 8 "
        "trainable ones with 512 entries, such as those of an adapter"
    ]
    assert not any("frozen" in text for text in second)


def half_frozen() -> nn.Module:
    model = OddNet()
    model.embed.weight.requires_grad_(False)
    model.blocks[0].bias.requires_grad_(False)
    return model


def check_frozen() -> list[str]:
    with collected_logs() as messages, engine_of(half_frozen, ds_config(epi=_section(), accumulation=2)) as engine:
        assert set(engine.epi.parameter_names) == {n for n, p in engine.module.named_parameters() if p.requires_grad}
        assert len(engine.epi.parameter_names) == 9
        for step in range(3 * INTERVAL):
            masks, before = full_masks(engine), full_weights(engine)
            train_step(engine, step, odd_batch)
            if step >= INTERVAL:
                _assert_held(before, full_weights(engine), masks)
    return messages


def test_frozen_parameters_are_not_covered() -> None:
    # Most of the model is trained: nothing to warn about.
    assert not any("frozen" in text for text in run_ranks(check_frozen, 2)[0])
