"""How far a trained model has gone from its base where it was trained: the KL divergence on the new task.

It predicts forgetting better than the distance of weights does (RL's Razor, arXiv 2509.04259).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epi_ds.data.conversation import Message

# Small: of every token of an answer there are two distributions over the vocabulary, in float64.
_BATCH = 8


def kl_to_base(base: Path, trained: Path, conversations: Sequence[Sequence[Message]]) -> float:
    """Return KL(base || trained) in nats, the mean over the tokens of the reference answers to a task's test prompts.

    base, trained  folders of models in Hugging Face format with one tokenizer
    conversations  test rows that end with the reference answer
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from epi_ds.demo.base_model import collate, encode

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    models = [AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval() for path in (base, trained)]
    encoded = encode(tokenizer, conversations)
    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(encoded), _BATCH):
            batch = collate(encoded[first : first + _BATCH], tokenizer.pad_token_id)
            answers = batch.pop("labels")[:, 1:] != -100
            of_base, of_trained = (_log_probabilities(model, batch, answers) for model in models)
            total += float((of_base.exp() * (of_base - of_trained)).sum())
            count += int(answers.sum())
    # Of equal models rounding may make it -0.
    return max(0.0, total / max(1, count))


def _log_probabilities(model: Any, batch: Any, answers: Any) -> Any:
    """Return log-probabilities of the tokens that follow, where they are of answers. [tokens, vocabulary] float64."""
    return model(**batch).logits[:, :-1][answers].double().log_softmax(-1)
