"""Small models whose shapes are awkward on purpose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OddNet(nn.Module):
    """Odd sizes, biases of one and three entries (empty partitions from 2 and 4 ranks on), numbered blocks, a norm."""

    def __init__(self, width: int = 13, num_blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)
        self.scale = nn.Linear(3, 1)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        output = self.scale(torch.tanh(self.head(self.norm(hidden))))
        return ((output.squeeze(-1) - target) ** 2).mean()


class EvenNet(OddNet):
    """Most of its weights divide by twice the number of ranks, as DeepSpeed's quantized gradients need it."""

    def __init__(self) -> None:
        super().__init__(width=16)


class TwoHeads(nn.Module):
    """A trunk and two heads of which a call uses one: the other is not reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(7, 9)
        self.heads = nn.ModuleList([nn.Linear(9, 5), nn.Linear(9, 5)])

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        return (self.heads[head](torch.tanh(self.trunk(inputs))) ** 2).mean()


class TiedLM(nn.Module):
    """Input and output embeddings are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 7)
        self.layers = nn.ModuleList([nn.Linear(7, 7)])
        self.lm_head = nn.Linear(7, 17, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = torch.tanh(self.layers[0](self.embed(tokens)))
        return nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), target.flatten())


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups, as Hugging Face's Trainer makes them: weight decay for matrices only."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.3, "lr": 2e-2},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 5e-3},
    ]


def decay_groups_with_own_betas(model: nn.Module) -> list[dict[str, Any]]:
    """The same groups, each with averages of its own length."""
    decayed, rest = decay_groups(model)
    return [decayed | {"betas": (0.8, 0.95)}, rest]


def head_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, int]:
    """For `TwoHeads`: every step uses one head, in turn."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * rank + micro_batch)
    return torch.randn(4, 7, generator=generator), step % 2


def late_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, int]:
    """For `TwoHeads`: every micro-batch of a window uses one head, in turn."""
    return head_batch(step, rank, micro_batch)[0], micro_batch % 2


def odd_batch(step: int, rank: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    """A batch that depends on its place in the run only."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * rank + micro_batch)
    tokens = torch.randint(0, 11, (4, 5), generator=generator)
    return tokens, torch.randn(4, 5, generator=generator)
