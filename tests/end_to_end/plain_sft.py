"""Runs in ranks: a plain TRL script, to which isolation is one callback.

    plain_sft.py MODEL FOLDER [RESUME_FROM | --continue | --unprepared | --newest [STEP]]

``--continue`` resumes from the newest checkpoint in FOLDER and keeps one; ``--unprepared`` leaves out what accelerate
needs on the CPU. ``--newest`` resumes where there is a checkpoint; in STEP rank 1 hears SIGTERM. Rank 0 writes
FOLDER/result.json: the losses by step, and a digest of the final mask and weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from deepspeed.utils import safe_get_full_fp32_param
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

import epi_ds
from epi_ds import ds_configs
from epi_ds.data.skills import Split, rows
from epi_ds.launch.environment import prepare_environment
from epi_ds.train.accelerate_setup import prepare_accelerate


class Signal(TrainerCallback):
    """Sends SIGTERM to this rank in a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def main(model_path: str, folder: Path, option: str | None, signal_step: int | None) -> None:
    """Train 8 steps, saving after the fourth."""
    conversations = [{"messages": list(row.messages)} for row in rows("code", split=Split.TRAIN, size=32, seed=0)]
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=8,
        save_steps=4,
        save_total_limit=1 if option == "--continue" else None,
        logging_steps=1,
        learning_rate=1e-3,
        max_length=128,
        seed=0,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        # Not told apart from a user's own file: the configuration has the "epi" section.
        deepspeed={**ds_configs.load("zero3"), "epi": {"ratio": 0.1, "refresh_interval": 3, "ema_decay": 0.9}},
        **({} if option == "--unprepared" else prepare_accelerate()),
    )
    isolation = epi_ds.EPICallback()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_path, dtype="float32"),
        args=args,
        train_dataset=Dataset.from_list(conversations),
        callbacks=[isolation],
    )
    if signal_step is not None and dist.get_rank() == 1:
        trainer.add_callback(Signal(signal_step))
    if option == "--unprepared":
        trainer.train()
        return
    if option == "--newest":
        trainer.train(resume_from_checkpoint=epi_ds.newest_checkpoint(folder))
    else:
        trainer.train(resume_from_checkpoint=True if option == "--continue" else option)
    digest = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        digest.update(isolation.epi.mask(name).numpy().tobytes())
        digest.update(safe_get_full_fp32_param(parameter).numpy().tobytes())
    stats = isolation.epi.stats()
    result: dict[str, Any] = {
        "losses": {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line},
        "digest": digest.hexdigest(),
        "engine": type(trainer.model_wrapped).__name__,
        "world_size": trainer.accelerator.num_processes,
        "isolated": stats.isolated,
        "applied_steps": stats.counters.applied_steps,
    }
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    prepare_environment()
    options = sys.argv[3:]
    main(sys.argv[1], Path(sys.argv[2]), *(options[:1] or [None]), int(options[1]) if len(options) > 1 else None)
