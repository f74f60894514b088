"""A small Llama that knows the built-in skills a little: something to fine-tune, and to forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from epi_ds.data.skills import Message, Split, load_tokenizer, rows

_IGNORED = -100


def small_llama(vocab_size: int, **changes: Any) -> LlamaForCausalLM:
    """Return an untrained Llama of about a million parameters."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # At the default of 0.02 attention stays uniform for hundreds of steps, and no copying is learnt.
        "initializer_range": 0.04,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def pretrain_small_model(
    folder: Path,
    *,
    skills: Sequence[str],
    steps: int,
    batch_size: int = 32,
    rows_per_skill: int = 4000,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a small Llama on a mixture of skills, in this process alone, and save it with its tokenizer.

    report  called with (finished steps, loss) after every step
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer()
    model = small_llama(
        len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    mixture = [
        row.messages for skill in skills for row in rows(skill, split=Split.TRAIN, size=rows_per_skill, seed=seed)
    ]
    encoded = encode(tokenizer, mixture)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(encoded), (batch_size,), generator=generator).tolist()
        loss = model(**collate([encoded[index] for index in chosen], tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        report(step + 1, float(loss.detach()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encode(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[int]]]:
    """Return tokens and labels of conversations; only the last turn is learnt."""

    def tokens_of(texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded

    whole = tokens_of(tokenizer.apply_chat_template([list(c) for c in conversations], tokenize=False))
    prompts = tokens_of(
        tokenizer.apply_chat_template([list(c[:-1]) for c in conversations], tokenize=False, add_generation_prompt=True)
    )
    return [
        (tokens, [_IGNORED] * len(prompt) + tokens[len(prompt) :])
        for tokens, prompt in zip(whole, prompts, strict=True)
    ]


def collate(batch: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Return the arguments of a forward over rows of `encode`, padded to the longest. [rows, length] int64 each."""
    length = max(len(tokens) for tokens, _ in batch)
    tokens = torch.full((len(batch), length), pad_token_id)
    labels = torch.full((len(batch), length), _IGNORED)
    attention = torch.zeros(len(batch), length, dtype=torch.long)
    for index, (row_tokens, row_labels) in enumerate(batch):
        size = len(row_tokens)
        tokens[index, :size] = torch.tensor(row_tokens)
        labels[index, :size] = torch.tensor(row_labels)
        attention[index, :size] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": attention}
