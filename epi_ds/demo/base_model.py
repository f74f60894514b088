"""A small Llama that knows some of the built-in skills: something to fine-tune, and to forget."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from epi_ds.data.conversation import Message
from epi_ds.data.rendering import Learnt
from epi_ds.data.skills import Split, load_tokenizer, rows

_IGNORED = -100
# Batches whose rows are sorted by length together.
_ROUND = 16


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
    learnt: Learnt = Learnt.LAST_TURN,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    rows_per_skill: int = 6000,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
    **shape: int,
) -> None:
    """Train a small Llama on a mixture of skills, in this process alone, and save it with its tokenizer.

    ``folder`` is whole or absent, also after a kill.

    learnt      EVERYTHING, for a model that can write rows of its own, whose questions are the skills'; with LAST_TURN,
                the answers alone, it knows as much in half of the steps
    batch_size  rows; those of a batch are of about one length, which halves the time
    report      called with (finished steps, loss) after every step
    shape       of `small_llama`
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer()
    model = small_llama(
        len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    mixture = [
        list(row.messages) for skill in skills for row in rows(skill, split=Split.TRAIN, size=rows_per_skill, seed=seed)
    ]
    encoded = encode(tokenizer, mixture)
    if learnt is Learnt.EVERYTHING:
        encoded = [(tokens, tokens) for tokens, _ in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    batches = _batches([len(ids) for ids, _ in encoded], batch_size, seed=seed)
    model.train()
    for step in range(1, steps + 1):
        batch = [encoded[index] for index in next(batches)]
        loss = model(**collate(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        report(step, float(loss.detach()))
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)


def _batches(lengths: list[int], batch_size: int, *, seed: int) -> Iterator[list[int]]:
    """Yield positions of rows without end: drawn at random, sorted by length among some batches' worth, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(len(lengths), (batch_size * _ROUND,), generator=generator).tolist()
        drawn.sort(key=lengths.__getitem__)
        order = torch.randperm(_ROUND, generator=generator).tolist()
        while order:
            first = order.pop() * batch_size
            yield drawn[first : first + batch_size]


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
