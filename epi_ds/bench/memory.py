"""``epi-ds bench memory``: the bytes of isolation on real ZeRO-3 engines, from the tensors that are alive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import epi_ds
from epi_ds.bench.ranks import run_on_ranks
from epi_ds.bench.tensors import live_storages, peak_bytes
from epi_ds.choices import Apply, StateFormat
from epi_ds.kernels import hold

_MIB = 1 << 20
_SUB_GROUP_NUMEL = 700_000
_STEPS = 2


class Pulled(StrEnum):
    """What an anchor keeps of the weights that it pulls towards."""

    NOTHING = "-"
    BF16 = "bf16"
    """They are bf16 values exactly."""
    FP32 = "fp32"


class Case(NamedTuple):
    """One combination of settings."""

    state: StateFormat
    apply: Apply
    ratio: float
    anchor: Pulled = Pulled.NOTHING
    """Beside isolation."""


class MemoryRow(NamedTuple):
    """The rank that needs most. Bytes are of tensors."""

    state: str
    apply: str
    ratio: float
    anchor: str
    world_size: int
    numel: int
    """Parameters of the model, all covered."""
    bytes_per_param_times_world: float
    """All that outlives a step: bytes per parameter, times the ranks that share it."""
    hold_bytes: int
    """Most that holding the weights of a sub-group takes, which is freed within its visit."""
    hold_bytes_bound: int
    """4 bytes times the ratio times the largest sub-group, and 16 MiB."""
    refresh_peak_bytes: int
    """Most that a refresh takes besides what was there before."""
    refresh_peak_bytes_bound: int
    """1 byte per parameter of this rank or 64 MB, whichever is larger."""


def cases(ratios: Sequence[float]) -> Iterator[Case]:
    """Yield every combination that exists: ``adam`` goes with ``apply: update`` only. Then those of an anchor."""
    for state in StateFormat:
        for apply in Apply:
            if state is not StateFormat.ADAM or apply is Apply.UPDATE:
                yield from (Case(state, apply, ratio) for ratio in ratios)
    for anchor in (Pulled.BF16, Pulled.FP32):
        yield Case(StateFormat.U16, Apply.REDUCTION, ratios[0], anchor)


def measure_memory(world_sizes: Sequence[int], ratios: Sequence[float]) -> list[MemoryRow]:
    """Train a Llama of 1.4 million parameters for a few steps in every case, at every world size."""
    rows = []
    for world_size in world_sizes:
        by_rank = run_on_ranks(_measure_all, world_size, list(cases(ratios)))
        for same_case in zip(*by_rank, strict=True):
            largest = max(same_case, key=lambda row: row.bytes_per_param_times_world)
            rows.append(
                largest._replace(
                    hold_bytes=max(row.hold_bytes for row in same_case),
                    refresh_peak_bytes=max(row.refresh_peak_bytes for row in same_case),
                )
            )
    return rows


def _measure_all(all_cases: Sequence[Case]) -> list[MemoryRow]:
    return [measure_case(case) for case in all_cases]


def measure_case(case: Case) -> MemoryRow:
    """Measure one case on this rank. Collective."""
    engine = _engine()
    generator = torch.Generator().manual_seed(dist.get_rank())

    def train() -> None:
        for _ in range(_STEPS):
            tokens = torch.randint(0, 256, (2, 16), generator=generator)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

    # Optimizer states and ZeRO-3's own buffers come into being in the first steps.
    train()
    before = sum(live_storages().values())
    section: dict[str, Any] = {
        "state": case.state,
        "apply": case.apply,
        "ratio": case.ratio,
        "refresh_interval": 1,
    }
    if case.anchor is not Pulled.NOTHING:
        section["anchor"] = {"decay": 1.0}
    if case.anchor is Pulled.BF16:
        for partition in engine.optimizer.fp32_partitioned_groups_flat:
            partition.data.copy_(partition.data.bfloat16())
    epi = epi_ds.attach(engine, section)
    train()
    after = sum(live_storages().values())
    _, refresh_peak = peak_bytes(epi.refresh_now)
    optimizer, controller = engine.optimizer, epi.controller
    partitions = optimizer.fp32_partitioned_groups_flat
    held = [
        peak_bytes(partial(hold, p.data, controller.masks.bits[i], controller.masks.isolated_here[i]))[1]
        for i, p in enumerate(partitions)
    ]
    numel, world_size = epi.stats().covered, dist.get_world_size()
    local = sum(partition.numel() for partition in partitions)
    engine.destroy()
    return MemoryRow(
        state=case.state.value,
        apply=case.apply.value,
        ratio=case.ratio,
        anchor=case.anchor.value,
        world_size=world_size,
        numel=numel,
        bytes_per_param_times_world=(after - before) * world_size / numel,
        hold_bytes=max(held),
        hold_bytes_bound=int(4 * case.ratio * max(partition.numel() for partition in partitions)) + 16 * _MIB,
        refresh_peak_bytes=refresh_peak,
        refresh_peak_bytes_bound=max(local, 64 * 10**6),
    )


def _engine() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=503,
        hidden_size=168,
        intermediate_size=444,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    ds_config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "sub_group_size": _SUB_GROUP_NUMEL},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=LlamaForCausalLM(config), config=ds_config)[0]
