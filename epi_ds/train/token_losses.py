"""The loss of every single token, as TRL's trainer computes it, and another weight of each in the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ObservedModel:
    """A model as TRL's ``SFTTrainer.compute_loss`` calls it; what it found of every token is read afterwards.

    TRL computes log-probabilities in chunks and gives nothing but their sum away, but it takes any callable for the
    model.
    """

    def __init__(self, model: Callable[..., Any], weights: Tensor | None) -> None:
        """``weights``, of the form of the log-probabilities, multiply the gradient of every token; None for all 1."""
        self._model = model
        self._weights = weights
        self._log_probs: Tensor | None = None
        self._is_learnt: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        """Call the model."""
        outputs = self._model(**inputs)
        # Others have logits: label smoothing is computed from these, and its tokens are asked for behind them.
        if inputs.get("fused_lm_head"):
            self._log_probs, self._is_learnt = outputs.log_probs.detach(), outputs.label_mask
            if self._weights is not None:
                outputs.log_probs = _Weighed.apply(outputs.log_probs, self._weights)  # type: ignore[no-untyped-call]
        return outputs

    @property
    def is_learnt(self) -> Tensor:
        """Of every token, whether the loss is on it. Raises RuntimeError where the model was not called."""
        if self._is_learnt is None:
            raise RuntimeError("the trainer computed a loss without its model's log-probabilities")
        return self._is_learnt

    def losses(self, loss_type: str) -> Tensor:
        """Return the loss of every token, 0 where it is not learnt.

        loss_type  TRL's: ``nll``, or ``dft`` (arXiv 2508.05629)
        """
        if self._log_probs is None:
            raise RuntimeError("the trainer computed a loss without its model's log-probabilities")
        return -self._log_probs * self._log_probs.exp() if loss_type == "dft" else -self._log_probs


class _Weighed(torch.autograd.Function):
    """Values as they are, whose gradients are multiplied.

    So a loss that is a sum over tokens has the gradient of a weighted sum, whatever it makes of a token's value.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return gradient * weights, None
