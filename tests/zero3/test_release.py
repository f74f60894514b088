"""Released entries must not jump: the release bound, measured on real ZeRO-3 with real Adam.

Gradients are prescribed (the loss is linear in the weights), so that their scale is known. Each of four layers has
three kinds of entries:

* A is isolated at the first refresh; *while isolated* its gradient scale changes by the layer's factor, and stays so;
* B becomes the largest in the second window, so the second refresh isolates it and releases A;
* C is never isolated.

Measured: RMS of |update| / lr over A in the ten steps after its release, over the same for C (pooled over the layers,
and for each factor).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.engines import ds_config, engine_of, full_weights
from tests.support.ranks import run_ranks
from tests.support.tiers import values_first

pytestmark = pytest.mark.zero3

FACTORS = (0.3, 1.0, 3.0, 10.0)
NUMEL = 500
KIND_A, KIND_B = slice(0, 100), slice(100, 200)
NEVER_ISOLATED = slice(200, NUMEL)
LEARNING_RATE = 1e-3
BOUND = 1.5
INTERVAL = 150


class Clipping(Enum):
    """What clipping does to the gradients during the measurement."""

    OFF = "off"
    STEADY = "steady"
    """A large uncovered parameter makes the norm, so the factor hardly changes."""
    JUMPING = "jumping"
    """The measured entries make the norm: the factor changes by up to 15 times from window to window."""


class Prescribed(nn.Module):
    """The gradient of every weight is the coefficient it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.zeros(NUMEL)) for _ in FACTORS)
        self.ballast = nn.Parameter(torch.zeros(NUMEL))

    def forward(self, coefficients: Tensor, ballast: Tensor) -> Tensor:
        rows = sum((layer * row).sum() for layer, row in zip(self.layers, coefficients, strict=True))
        return rows + (self.ballast * ballast).sum()


def gradients(step: int, rank: int, clipping: Clipping) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1009 * step + rank)
    rows = torch.randn(len(FACTORS), NUMEL, generator=generator)
    if step < INTERVAL:
        rows[:, KIND_A] *= 30
    else:
        factors = torch.tensor(FACTORS).unsqueeze(1)
        rows[:, KIND_A] *= 30 * factors
        rows[:, KIND_B] *= 100 * factors
    ballast = torch.randn(NUMEL, generator=generator)
    return rows, ballast * (1e4 if clipping is Clipping.STEADY else 0.0)


class ReleaseRatio(NamedTuple):
    pooled: float
    by_factor: dict[float, float]


def measure(
    apply: str, beta2: float, clipping: Clipping, offload: bool = False, anchor: dict[str, Any] | None = None
) -> ReleaseRatio:
    section: dict[str, Any] = {
        "ratio": 0.2,
        "refresh_interval": INTERVAL,
        "ema_decay": 0.99,
        "selection": "per_layer",
        "layer": "tensor",
        "exclude": ["ballast"],
        "apply": apply,
    }
    if anchor is not None:
        section["anchor"] = anchor
    adam = {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0.0, "betas": [0.9, beta2]}}
    max_norm = 0.0 if clipping is Clipping.OFF else 1.0
    config = ds_config(epi=section, optimizer=adam, gradient_clipping=max_norm, offload=offload)
    with engine_of(Prescribed, config) as engine:

        def train(first: int, last: int) -> None:
            for step in range(first, last):
                engine.backward(engine(*gradients(step, dist.get_rank(), clipping)))
                engine.step()

        # The learning rate is constant over the windows and what is measured.
        engine.epi.plan_stage([LEARNING_RATE * (2 * INTERVAL + 10)])
        names = engine.epi.parameter_names
        train(0, INTERVAL)
        for name in names:
            assert engine.epi.mask(name)[KIND_A].all()
        train(INTERVAL, 2 * INTERVAL)
        for name in names:
            mask = engine.epi.mask(name)
            assert mask[KIND_B].all()
            assert not mask[KIND_A].any()
        released, plastic = torch.zeros(len(FACTORS)), torch.zeros(len(FACTORS))
        for step in range(2 * INTERVAL, 2 * INTERVAL + 10):
            before = full_weights(engine)
            train(step, step + 1)
            after = full_weights(engine)
            for index, name in enumerate(names):
                update = ((after[name] - before[name]) / LEARNING_RATE).square()
                released[index] += update[KIND_A].mean()
                plastic[index] += update[NEVER_ISOLATED].mean()
        by_factor = (released / plastic).sqrt().tolist()
        pooled = float((released.sum() / plastic.sum()).sqrt())
        return ReleaseRatio(pooled, dict(zip(FACTORS, by_factor, strict=True)))


@pytest.mark.parametrize(
    ("apply", "beta2", "clipping"), values_first(product(["reduction", "update"], [0.99, 0.999], Clipping))
)
def test_released_entries_do_not_jump(
    apply: str, beta2: float, clipping: Clipping, record_property: Callable[[str, object], None]
) -> None:
    ratio = run_ranks(measure, 1, apply, beta2, clipping)[0]
    record_property("measured", _sentence(ratio, f"apply {apply}, beta2 {beta2}, clipping {clipping.value}"))
    if apply == "update" and clipping is Clipping.JUMPING:
        # The moments that `update` keeps (the paper's eq. 12-13) are of gradients clipped at another norm, so the bound
        # does not hold; `reduction` rebuilds them. README lists it as a limit, which this line keeps honest.
        assert ratio.pooled > BOUND
        return
    assert ratio.pooled <= BOUND
    assert max(ratio.by_factor.values()) <= BOUND


@pytest.mark.slow
def test_released_entries_do_not_jump_across_ranks_with_offload(record_property: Callable[[str, object], None]) -> None:
    ratio = run_ranks(measure, 2, "reduction", 0.999, Clipping.JUMPING, True)[0]
    record_property("measured", _sentence(ratio, "apply reduction, beta2 0.999, clipping jumping, 2 ranks, offload"))
    assert ratio.pooled <= BOUND
    assert max(ratio.by_factor.values()) <= BOUND


PULL = {"strength": 2.0, "pull": "gradient"}


@pytest.mark.parametrize(
    ("apply", "beta2", "clipping"),
    [
        ("reduction", 0.999, Clipping.OFF),
        ("update", 0.999, Clipping.OFF),
        ("reduction", 0.99, Clipping.JUMPING),
        pytest.param("update", 0.99, Clipping.OFF, marks=pytest.mark.slow),
    ],
)
def test_released_entries_do_not_jump_where_an_anchor_pulls_in_the_gradient(
    apply: str, beta2: float, clipping: Clipping, record_property: Callable[[str, object], None]
) -> None:
    """Importance knows nothing of the pull: by it alone they moved 2.02 times as far (`reduction`), or 2.85."""
    ratio = run_ranks(measure, 1, apply, beta2, clipping, False, PULL)[0]
    record_property("measured", _sentence(ratio, f"anchor, apply {apply}, beta2 {beta2}, clipping {clipping.value}"))
    assert ratio.pooled <= BOUND
    assert max(ratio.by_factor.values()) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("apply", ["reduction", "update"])
def test_released_entries_do_not_jump_under_a_strong_pull(
    apply: str, record_property: Callable[[str, object], None]
) -> None:
    """With the square of the pull counted once they moved 1.68 times as far (`reduction`), or 2.00."""
    ratio = run_ranks(measure, 1, apply, 0.999, Clipping.OFF, False, {**PULL, "strength": 8.0})[0]
    record_property("measured", _sentence(ratio, f"anchor of strength 8, apply {apply}, beta2 0.999"))
    assert ratio.pooled <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("apply", ["reduction", "update"])
def test_released_entries_do_not_jump_with_an_anchor_across_ranks_with_offload(
    apply: str, record_property: Callable[[str, object], None]
) -> None:
    ratio = run_ranks(measure, 2, apply, 0.999, Clipping.OFF, True, PULL)[0]
    record_property("measured", _sentence(ratio, f"anchor, apply {apply}, beta2 0.999, 2 ranks, offload"))
    assert ratio.pooled <= BOUND
    assert max(ratio.by_factor.values()) <= BOUND


@pytest.mark.parametrize("apply", ["reduction", "update"])
def test_a_pull_above_all_gradients_takes_released_entries_back_at_its_own_pace(apply: str) -> None:
    """The bound compares with entries that the pull never let go, and hardly move: where-it-works.md lists it.

    An uncovered parameter has gradients ten thousand times as large, and the pull is in proportion to all of them.
    """
    assert run_ranks(measure, 1, apply, 0.999, Clipping.STEADY, False, PULL)[0].pooled > BOUND


def _sentence(ratio: ReleaseRatio, setting: str) -> str:
    factors = ", ".join(f"x{factor:g}: {value:.2f}" for factor, value in ratio.by_factor.items())
    return f"release ratio, {setting}: {ratio.pooled:.2f} ({factors})"
