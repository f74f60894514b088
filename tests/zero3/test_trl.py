"""What is asked of TRL, and so the oldest release that may be installed: ranks whose answers are of unequal lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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


def defined_loss(trainer: SFTTrainer, rows: list[int], loss_type: str) -> float:
    """Return the loss of some rows by its definition, from logits: the weights are still whole on every rank."""
    total, learnt = 0.0, 0
    for row in rows:
        batch = trainer.data_collator([trainer.train_dataset[row]])
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        log_probabilities = logits[:, :-1].double().log_softmax(dim=-1)
        chosen = log_probabilities.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[labels != -100]
        weight = chosen.exp() if loss_type == "dft" else torch.ones_like(chosen)
        total, learnt = total - float((weight * chosen).sum()), learnt + len(chosen)
    return total / learnt


def train(folder: str, loss_type: str = "nll") -> tuple[list[float], float]:
    """Train on rows of which one rank's answers are forty times as long as the other's.

    Returns the losses, and what the first one is by definition.
    """
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
            loss_type=loss_type,
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
        expected = defined_loss(trainer, [0, 1], loss_type)
        trainer.train()
    finally:
        # The next call in these ranks makes engines of its own.
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], expected


@pytest.mark.slow
def test_answers_of_unequal_lengths_do_not_leave_a_rank_behind(tmp_path: Path) -> None:
    (first, _), (second, _) = run_ranks(train, 2, str(tmp_path), timeout=120)
    assert first == second
    assert len(first) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_a_loss_is_what_it_is_defined_as(tmp_path: Path, loss_type: str) -> None:
    for losses, expected in run_ranks(train, 2, str(tmp_path), loss_type, timeout=120):
        # fp32 against fp64.
        assert losses[0] == pytest.approx(expected, rel=1e-4)
        # It is learnt: another step has another loss, and none is a NaN.
        assert len(set(losses)) == STEPS
