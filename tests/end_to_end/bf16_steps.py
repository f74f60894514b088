"""Runs in ranks, on whatever DeepSpeed's accelerator is: steps of ZeRO-3 in bf16, plain and with isolation.

    bf16_steps.py FOLDER

Rank 0 writes FOLDER/result.json: losses by kind of engine, seconds a step, bytes allocated at most. The isolated engine
saves after two steps under one mask, for `epi-ds audit`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from epi_ds.demo.base_model import small_llama
from epi_ds.launch.environment import prepare_environment
from tests.support.engines import ds_config, engine_of

VOCABULARY = 512
LENGTH = 64
STEPS = 5
SECTIONS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "ratio 0": {"ratio": 0, "refresh_interval": 3, "state": "u16"},
    "isolated": {"ratio": 0.2, "refresh_interval": 3, "state": "u16", "ema_decay": 0.9},
}


def train(section: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Take a few steps; return what they were like."""
    accelerator = get_accelerator()
    config = ds_config(epi=section, bf16={"enabled": True}, zero_optimization={"reduce_bucket_size": 200_000})
    # Needs no compiler for the device.
    config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    losses, seconds = [], []
    with engine_of(lambda: small_llama(VOCABULARY).to(torch.bfloat16), config) as engine:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step * 100 + dist.get_rank())
            tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator).to(engine.device)
            started = time.perf_counter()
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
            accelerator.synchronize()
            seconds.append(time.perf_counter() - started)
            if section and section["ratio"] and step >= STEPS - 2:
                assert engine.save_checkpoint(str(folder / "checkpoints"))
        isolated = engine.epi.stats().isolated if section else 0
    return {"losses": losses, "seconds": seconds, "isolated": isolated, "bytes": accelerator.max_memory_allocated()}


def main(folder: Path) -> None:
    """Train one engine after the other."""
    import deepspeed

    prepare_environment()
    deepspeed.init_distributed()
    results = {name: train(section, folder) for name, section in SECTIONS.items()}
    if dist.get_rank() == 0:
        device = get_accelerator().device_name(0) if get_accelerator().device_count() else "cpu"
        (folder / "result.json").write_text(json.dumps({"device": device, **results}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
