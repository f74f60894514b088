"""A user's own DeepSpeed loop that can be preempted; knows torch's variables, and nothing of who starts it.

    plain_loop.py FOLDER

Saves where it is told to end, and goes on from there. A line per step goes to FOLDER/rank_R.jsonl; at the end rank 0
writes FOLDER/result.json: a digest of weights and masks.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

import epi_ds
from epi_ds.launch.teardown import skip_teardown

STEPS = 40
SECONDS = 0.15

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
deepspeed.init_distributed("gloo")
rank = int(os.environ["RANK"])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
engine, *_ = epi_ds.initialize(
    model=model,
    config={
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "epi": {"ratio": 0.2, "refresh_interval": 3},
    },
)
engine.load_checkpoint(str(folder))
preemption = epi_ds.Preemption(engine)
while engine.global_steps < STEPS:
    torch.manual_seed(engine.global_steps * 100 + rank)
    loss = engine(torch.randn(4, 7)).square().mean()
    engine.backward(loss)
    engine.step()
    # Long enough that signals come at different steps.
    time.sleep(SECONDS)
    with (folder / f"rank_{rank}.jsonl").open("a") as log:
        log.write(json.dumps({"step": engine.global_steps, "loss": loss.item()}) + "\n")
    if preemption.is_due():
        engine.save_checkpoint(str(folder))
        preemption.leave()

digest = hashlib.sha256()
for name, parameter in engine.module.named_parameters():
    digest.update(engine.epi.mask(name).numpy().tobytes())
    digest.update(safe_get_full_fp32_param(parameter).numpy().tobytes())
if rank == 0:
    (folder / "result.json").write_text(json.dumps({"digest": digest.hexdigest()}))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# On a busy machine a thread of gloo may still hold something of Python here, and aborts the process.
skip_teardown(0)
