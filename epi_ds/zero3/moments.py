"""Adam's moments at isolation and at release, for ``apply: reduction``, and where an anchor pulls in the gradient.

[Note: release] While an entry is isolated its gradient counts as zero. Released with moments starved by that, it would
jump. Importance kept measuring it, so at release the second moment is rebuilt from it. Both are exponential
averages that started at zero; with t the age of the optimizer state and w the total weight of the squared gradients in
the importance (1 - ema_decay^t' after t' steps, 1 after a probe),

    exp_avg    := 0
    exp_avg_sq := S * c2 * (1 - beta2^t) / w

where c2 is the average squared clipping factor (the optimizer sees clipped gradients, the importance raw ones). c2
decays by beta2, as the second moments of the other entries do: they remember the clipping of the last 1/(1 - beta2)
steps, and an entry released with a shorter memory moves several times as far as they do when clipping changes.
An anchor in the gradient adds p to what the optimizer sees, but not to what importance does. A held entry stands still,
and its p with it, the same in every step, so that it outweighs noise of its own size: within ten steps the first moment
comes to .45 p (root mean square, beta1 .9), that of noise to .23 times its size. So p counts twice, and the second
moment of both is rebuilt as (S * c2 / w + 4 p^2) * (1 - beta2^t). Under ``apply: update`` the moments have tracked all
of it once: 3 p^2 are added at release, and the first moment, which is nearly p, is set to 0 there too.
At isolation ``exp_avg := 0``, and again after every step: what zero gradients would have left there. The optimizer is
shown the gradient as it is. To zero it first would need a copy beside that of the weights wherever ZeRO-3 keeps the
buffer, since a later step may apply it as a stale gradient; ``exp_avg_sq`` then tracks something that release replaces.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from epi_ds.isolation.importance.views import ReadPartition
from epi_ds.kernels import chunks, unpack_bits

STEADY = 4.0
"""How many times the square of what is the same in every step counts. See [Note: release]."""


class ClippingAverage:
    """Exponential average of the squared clipping factor, corrected for its start at zero."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.reset()

    def reset(self) -> None:
        """Forget everything, along with the optimizer state."""
        self._sum = 0.0
        # Total weight of the observations so far, 1 - decay^steps.
        self._weight = 0.0

    def observe(self, factor: float) -> None:
        """Take in what the step just applied multiplied its gradients by."""
        self._sum = self._decay * self._sum + (1.0 - self._decay) * factor * factor
        self._weight = self._decay * self._weight + (1.0 - self._decay)

    @property
    def corrected(self) -> float:
        """The average; 1 before the first step."""
        return self._sum / self._weight if self._weight else 1.0

    def to_dict(self) -> dict[str, float]:
        """Return what `restore` takes; JSON keeps every bit of it."""
        return {"sum": self._sum, "weight": self._weight}

    def restore(self, saved: dict[str, float]) -> None:
        """Continue from a saved average."""
        self._sum, self._weight = saved["sum"], saved["weight"]


def clipping_factor(gradient_norm: float, max_norm: float) -> float:
    """Return what ZeRO-3 multiplies a gradient of this norm by; ``max_norm`` <= 0 means no clipping."""
    # The same expression as in ZeRO-3's unscale_and_clip_grads, so that this is the factor the optimizer saw.
    return 1.0 / max(1.0, (gradient_norm + 1e-6) / max_norm) if max_norm > 0 else 1.0


def state_age(state: MutableMapping[str, Any]) -> int:
    """Return the number of steps an Adam state has taken."""
    step = state.get("step", 0)
    return int(step.item()) if isinstance(step, Tensor) else int(step)


def set_moments(
    state: MutableMapping[str, Any],
    *,
    before: Tensor,
    now: Tensor,
    importance: ReadPartition | None,
    importance_scale: float,
    pull: Tensor | None = None,
) -> None:
    """Set the moments of entries whose isolation changes, in place. See [Note: release].

    state             the Adam state of one flat partition; an empty one (no step taken yet) is left alone
    before, now       [ceil(numel / 8)] uint8
    importance        reads the same partition; None where the second moment stays as it is, but for what ``pull`` adds
    importance_scale  c2 * (1 - beta2^t) / w
    pull              [numel] fp32, on the partition's device: the root of what the pull adds to the second moment of
                      what is released; None where nothing is pulled
    """
    if "exp_avg" not in state:
        return
    first, second = state["exp_avg"], state["exp_avg_sq"]
    changed = before ^ now
    for start, stop in chunks(0, first.numel()):
        if not changed[start // 8 : -(-stop // 8)].any():
            continue
        first[start:stop].masked_fill_(unpack_bits(changed, start, stop), 0.0)
        if importance is None and pull is None:
            continue
        released = unpack_bits(before, start, stop) & ~unpack_bits(now, start, stop)
        if not released.any():
            continue
        kept = second[start:stop]
        rebuilt = kept.float() if importance is None else importance(start, stop) * importance_scale
        if pull is not None:
            rebuilt = rebuilt + pull[start:stop].square()
        rebuilt = rebuilt.clamp(max=torch.finfo(second.dtype).max).to(second.dtype)
        second[start:stop] = torch.where(released, rebuilt, kept)


def reset_moments(state: MutableMapping[str, Any]) -> None:
    """Return one optimizer state to age zero, in place: every tensor of it and the step counter to 0."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            value.zero_()
        elif key == "step":
            state[key] = 0
