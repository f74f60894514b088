"""Importance of a small language model in training, kept in every format from the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from epi_ds.choices import StateFormat
from epi_ds.data.skills import Split, load_tokenizer, rows
from epi_ds.demo.base_model import collate, encode, small_llama
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Layout, Parameter, Segment, build_layout
from epi_ds.isolation.placement import Placement

# What a million parameters take; powers of two mislead benchmarks.
_WIDTHS = {"hidden_size": 152, "intermediate_size": 408}
_SKILLS = ("dialogue", "arithmetic", "logic", "code")
_ROWS_PER_SKILL = 1000
_BATCH_SIZE = 8


class Trained(NamedTuple):
    """The same training, as every state remembers it."""

    layout: Layout
    states: dict[StateFormat, Importance]


class _Moments:
    """Second moments of torch's AdamW, by parameter."""

    code_shift = 0

    def __init__(self, optimizer: torch.optim.AdamW, parameters: dict[str, Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, parameters

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        moments: Tensor = self._optimizer.state[self._parameters[segment.name]]["exp_avg_sq"]
        return moments.view(-1)[start:stop]


def train_states(
    steps: int,
    *,
    ema_decay: float = 0.99,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """Train a Llama of 1.2 million parameters on the built-in skills; AdamW's beta2 is ``ema_decay``.

    report  called with (finished steps, loss) after every step
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer()
    model = small_llama(len(tokenizer), **_WIDTHS, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    layout = build_layout(
        [[Parameter(name, tuple(parameter.shape)) for name, parameter in parameters.items()]],
        rank=0,
        world_size=1,
        layer="block",
    )
    placement = Placement(layout, (torch.device("cpu"),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, ema_decay))
    stored: dict[StateFormat, StoredImportance] = {
        state: StoredImportance(placement, state, seed=seed, purpose="importance")
        for state in StateFormat
        if state is not StateFormat.ADAM
    }
    conversations = [
        row.messages for skill in _SKILLS for row in rows(skill, split=Split.TRAIN, size=_ROWS_PER_SKILL, seed=seed)
    ]
    encoded = encode(tokenizer, conversations)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(encoded), (_BATCH_SIZE,), generator=generator).tolist()
        loss = model(**collate([encoded[index] for index in chosen], tokenizer.pad_token_id)).loss
        loss.backward()
        for segment in layout.segments:
            gradient = parameters[segment.name].grad
            for importance in stored.values():
                importance.observe(
                    segment,
                    None if gradient is None else gradient.view(-1),
                    ema_decay=ema_decay,
                    inverse_scale=1.0,
                    step=step,
                )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step + 1, float(loss.detach()))
    states: dict[StateFormat, Importance] = dict(stored)
    states[StateFormat.ADAM] = _Moments(optimizer, parameters)
    return Trained(layout, states)
