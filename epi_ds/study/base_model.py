"""A small Llama that knows its skills, made once for every seed and set of them: ``python -m epi_ds.study.base_model``.

It learns all tokens and not the answers alone: so it can write rows of its own, whose questions are the skills'. Rows
of a batch are of about one length, which halves the time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ROUND = 16


def pretrain(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the model that ``settings`` describe, see `cells.base_settings`; whole or absent also after a kill."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from epi_ds.data.skills import Split, load_tokenizer, rows
    from epi_ds.demo.base_model import collate, small_llama

    torch.manual_seed(settings["seed"])
    tokenizer = load_tokenizer()
    width = settings["hidden_size"]
    model = small_llama(
        len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=settings["num_hidden_layers"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    mixture = [
        list(row.messages)
        for skill in settings["skills"]
        for row in rows(skill, split=Split.TRAIN, size=settings["rows"], seed=settings["seed"])
    ]
    texts = tokenizer.apply_chat_template(mixture, tokenize=False)
    encoded = [(ids, ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    steps = settings["steps"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    batches = _batches([len(ids) for ids, _ in encoded], settings["batch_size"], seed=settings["seed"])
    model.train()
    for step in range(1, steps + 1):
        batch = [encoded[index] for index in next(batches)]
        loss = model(**collate(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"pretraining step {step}/{steps}  loss {float(loss.detach()):.3f}", flush=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "study.json").write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(unfinished, folder)


def _batches(lengths: list[int], batch_size: int, *, seed: int) -> Iterator[list[int]]:
    """Yield positions of rows without end: drawn at random, sorted by length among some batches' worth, shuffled."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(len(lengths), (batch_size * _ROUND,), generator=generator).tolist()
        drawn.sort(key=lengths.__getitem__)
        order = torch.randperm(_ROUND, generator=generator).tolist()
        while order:
            first = order.pop() * batch_size
            yield drawn[first : first + batch_size]


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]), json.loads(sys.argv[2]))
