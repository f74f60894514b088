"""Gradients of a model on rows of a skill: what its loss says it would rather be, and how much each entry matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from epi_ds.data.skills import Split, rows
from epi_ds.demo.base_model import collate, encode
from epi_ds.evaluation.tasks import TEST_SEED

BATCH_SIZE = 16


class SkillGradients(NamedTuple):
    """Of the mean loss of a token of the reference answers, by parameter; fp32, of the parameters' shapes."""

    mean: dict[str, Tensor]
    """Mean over the batches."""
    mean_square: dict[str, Tensor]
    """Mean over the batches of the squared gradient: the diagonal of the empirical Fisher matrix, by batch as online
    importance has it (the paper's eq. 6)."""


class GradientMeter:
    """Measures gradients of a model that lies in a folder. Its weights do not change."""

    def __init__(self, folder: Path) -> None:
        """Load the model in fp32 on the CPU, with dropout off."""
        disable_progress_bar()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    def of(self, skill: str, *, batches: int) -> SkillGradients:
        """Return the gradients on batches of `BATCH_SIZE` of a skill's test rows, which are the same every time."""
        drawn = rows(skill, split=Split.TEST, size=batches * BATCH_SIZE, seed=TEST_SEED)
        encoded = encode(self._tokenizer, [row.messages for row in drawn])
        parameters = dict(self._model.named_parameters())
        mean = {name: torch.zeros_like(value) for name, value in parameters.items()}
        mean_square = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for first in range(0, len(encoded), BATCH_SIZE):
            batch = collate(encoded[first : first + BATCH_SIZE], self._tokenizer.pad_token_id)
            gradients = torch.autograd.grad(self._model(**batch).loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                mean[name].add_(gradient, alpha=1 / batches)
                mean_square[name].addcmul_(gradient, gradient, value=1 / batches)
        return SkillGradients(mean, mean_square)
