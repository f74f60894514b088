"""What is asked of TRL, and so the oldest release that may be installed: ranks whose answers are of unequal lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

import epi_ds
from epi_ds import ds_configs
from epi_ds.data.skills import load_tokenizer
from epi_ds.demo.base_model import small_llama
from epi_ds.train.accelerate_setup import prepare_accelerate
from tests.support.ranks import run_ranks
from tests.support.tables import prompts_and_completions

pytestmark = pytest.mark.zero3

STEPS = 3


def train(folder: str) -> list[float]:
    """Train on rows of which one rank's answers are forty times as long as the other's; return the losses."""
    words = [1 if index % 2 else 40 for index in range(2 * STEPS)]
    conversations = [
        [{"role": "user", "content": f"Say {count}."}, {"role": "assistant", "content": "word " * count}]
        for count in words
    ]
    tokenizer = load_tokenizer()
    try:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            save_strategy="no",
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            logging_steps=1,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            deepspeed={**ds_configs.load("cpu"), "epi": {"ratio": 0.1, "refresh_interval": 1}},
            **prepare_accelerate(),
        )
        trainer = SFTTrainer(
            # Where the head is a weight of its own, TRL may fetch it chunk by chunk.
            small_llama(len(tokenizer), hidden_size=16, tie_word_embeddings=False),
            args=args,
            train_dataset=prompts_and_completions(conversations),
            processing_class=tokenizer,
            callbacks=[epi_ds.EPICallback()],
        )
        trainer.train()
    finally:
        # The next call in these ranks makes engines of its own.
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.slow
def test_answers_of_unequal_lengths_do_not_leave_a_rank_behind(tmp_path: Path) -> None:
    losses = run_ranks(train, 2, str(tmp_path), timeout=120)
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
