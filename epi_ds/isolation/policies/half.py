"""``policy: half``: Half Fine-Tuning, HFT (arXiv 2404.18466). Half of the matrices stand still, in every stage another.

[Note: halves] The paper chooses at random within categories, which did best there. In every transformer block: two of
the four matrices of attention, of the three of the feed-forward network two in a random half of the blocks and one in
the others, and half of the norms. Embeddings, the head and the norm outside the blocks move. Every stage chooses anew.

Here a category is what lies beside each other in a block: the matrices of one module (``self_attn``, ``mlp``, an
expert), and the vectors of the block (norms); a bias goes with its matrix. Of an even number half stand still, of an
odd one the larger half in a random half of the blocks and the smaller half in the others. So half of the matrices stand
still, and of their entries about half where they differ in size, as under grouped-query attention; the report has the
share. Where it departs from the paper: nothing is faster, since gradients are computed and the mask acts on the update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Segment, block_of
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.policies.base import Policy

_VECTORS = "vectors"


@dataclass(frozen=True)
class Half(Policy):
    """Choose before the first step and whenever a stage ends. Measures nothing and keeps no state."""

    seed: int

    def observes(self, step: int) -> bool:
        """Never."""
        return False

    def refreshes(self, step: int) -> bool:
        """Never: only stages end a choice."""
        return False

    @property
    def selects_at_start(self) -> bool:
        """Always."""
        return True

    @property
    def selects_at_stage_ends(self) -> bool:
        """Always."""
        return True

    def ranking(self, placement: Placement, *, draw: int) -> Importance:
        """Return a choice. See [Note: halves]."""
        return ChosenHalf(placement, seed=self.seed, draw=draw)


class ChosenHalf:
    """One choice, read as importance: 1 what stands still, 0 what moves."""

    code_shift = 0
    """See `Importance.code_shift`."""

    def __init__(self, placement: Placement, *, seed: int, draw: int) -> None:
        segments = placement.layout.segments
        self._placement = placement
        self._chosen = still_half(segments, name=f"{seed}/half/{draw}")
        self.entries = sum(segment.numel for segment in segments if segment.name in self._chosen)
        """Entries that stand still, over all ranks."""

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        value = 1.0 if segment.name in self._chosen else 0.0
        return torch.full((stop - start,), value, device=self._placement.home_of(segment))


def still_half(segments: Sequence[Segment], *, name: str) -> frozenset[str]:
    """Return the parameters that stand still. See [Note: halves].

    name  of the choice: another one chooses otherwise
    """
    units: dict[str, list[Segment]] = {}
    for segment in segments:
        if any(part.isdigit() for part in segment.name.split(".")):
            units.setdefault(segment.name.removesuffix(".weight").removesuffix(".bias"), []).append(segment)
    # By category, and in it by the module that the units lie beside each other in.
    modules: dict[str, dict[str, list[str]]] = {}
    for unit, members in units.items():
        category, module = _place_of(unit, members)
        modules.setdefault(category, {}).setdefault(module, []).append(unit)
    still: set[str] = set()
    for members_of in modules.values():
        odd = _shuffled((module for module, found in members_of.items() if len(found) % 2), name=name)
        for module, found in members_of.items():
            count = len(found) // 2 + (module in odd[: len(odd) // 2])
            still.update(_shuffled(found, name=name)[:count])
    return frozenset(segment.name for unit in still for segment in units[unit])


def _place_of(unit: str, members: Sequence[Segment]) -> tuple[str, str]:
    """Return the category of a unit, the same in all blocks, and the module of its block that it lies in."""
    block = block_of(members[0].name)
    inside = unit.removeprefix(block).removeprefix(".").split(".")[:-1]
    if all(len(member.shape) < 2 for member in members):
        return _VECTORS, f"{block}/{_VECTORS}"
    return ".".join("*" if part.isdigit() else part for part in inside), ".".join([block, *inside])


def _shuffled(names: Iterable[str], *, name: str) -> list[str]:
    """Return names in an order that depends on them and on ``name`` alone: the same on every rank."""
    return sorted(names, key=lambda one: hashlib.blake2b(f"{name}/{one}".encode(), digest_size=16).digest())
