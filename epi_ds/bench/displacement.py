"""``epi-ds bench displacement``: whether one ``strength`` of an anchor means the same at other rates and lengths.

A small model that knows four skills learns a fifth one, without an anchor and with either pull, from the same rows in
the same order. What an anchor leaves is the distance of all weights from where they began, over that of the plain run
of the same rate and length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import epi_ds
from epi_ds.bench.ranks import run_on_ranks
from epi_ds.choices import Pull
from epi_ds.data.skills import Split, rows
from epi_ds.demo.base_model import collate, encode, pretrain_small_model
from epi_ds.planned_rates import planned_rates

KNOWN = ("dialogue", "arithmetic", "logic", "code")
NEW = "instruct"
_LEARNING_RATE = 1e-3
_BATCH = 16
_ROWS = 4000
_KNOWN_STEPS = 300
# Of the rate and of the number of steps, one of them at a time.
RATES = (0.25, 1.0, 4.0)
LENGTHS = (0.5, 1.0, 2.0)


class DisplacementRow(NamedTuple):
    """One rate and length, plain and with either pull."""

    rate: float
    """Times the learning rate of the middle row."""
    steps: int
    strength: float
    plain_distance: float
    """Euclidean, of all weights from where they began."""
    update_share: float
    """What ``pull: update`` leaves of that distance."""
    gradient_share: float
    """What ``pull: gradient`` leaves of it."""
    plain_loss: float
    """Mean over the last ten steps."""
    update_loss: float
    gradient_loss: float


class _Run(NamedTuple):
    distance: float
    loss: float


def measure_displacement(strength: float, steps: int, folder: Path) -> list[DisplacementRow]:
    """Measure every rate at ``steps``, and every length at the middle rate; the small model is made in ``folder``."""
    pretrain_small_model(folder, skills=KNOWN, steps=_KNOWN_STEPS, batch_size=_BATCH)
    cases = [(rate, steps) for rate in RATES]
    cases += [(1.0, round(steps * length)) for length in LENGTHS if length != 1.0]
    found: list[DisplacementRow] = run_on_ranks(_measure_all, 1, strength, cases, str(folder))[0]
    return found


def _measure_all(strength: float, cases: Sequence[tuple[float, int]], folder: str) -> list[DisplacementRow]:
    measured = []
    for rate, steps in cases:
        plain, update, gradient = (_train(folder, rate, steps, pull, strength) for pull in (None, *Pull))
        measured.append(
            DisplacementRow(
                rate=rate,
                steps=steps,
                strength=strength,
                plain_distance=plain.distance,
                update_share=update.distance / plain.distance,
                gradient_share=gradient.distance / plain.distance,
                plain_loss=plain.loss,
                update_loss=update.loss,
                gradient_loss=gradient.loss,
            )
        )
    return measured


def _train(folder: str, rate: float, steps: int, pull: Pull | None, strength: float) -> _Run:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate * _LEARNING_RATE, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, steps)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": _BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if pull is not None:
        epi = epi_ds.attach(engine, {"policy": "none", "anchor": {"strength": strength, "pull": pull}})
        epi.plan_stage(planned_rates(scheduler, first_step=0, stop_step=steps))
    start, losses = _weights(engine), []
    for batch in _batches(tokenizer, steps):
        for group, own in zip(engine.optimizer.param_groups, scheduler.optimizer.param_groups, strict=True):
            group["lr"] = own["lr"]
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    distance = math.sqrt(float((_weights(engine) - start).square().sum()))
    engine.destroy()
    return _Run(distance, sum(losses[-10:]) / len(losses[-10:]))


def _weights(engine: Any) -> Tensor:
    """Return all master weights, which one rank holds. fp64"""
    return torch.cat([partition.detach().double() for partition in engine.optimizer.fp32_partitioned_groups_flat])


def _batches(tokenizer: Any, steps: int) -> Iterator[dict[str, Tensor]]:
    """Yield the same batches to every run of a length."""
    encoded = encode(tokenizer, [row.messages for row in rows(NEW, split=Split.TRAIN, size=_ROWS, seed=0)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(encoded), (_BATCH,), generator=generator).tolist()
        yield collate([encoded[index] for index in chosen], tokenizer.pad_token_id)
