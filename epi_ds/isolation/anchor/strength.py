"""How strongly an anchor pulls in one step.

[Note: strength] Let s be the strength, lr the learning rate of the step, and L the sum of the learning rates that are
planned for the stage. Under ``pull: update`` a weight w goes back to its anchor a, after the optimizer's update, by

    w <- w - (1 - exp(-s * omega * lr / L)) * (w - a)

so that what a step moves a weight by is left at exp(-s * omega) of itself once a whole stage has followed it, at any
length and any learning rate. Under ``pull: gradient`` a penalty's gradient is added to the clipped one,

    g <- g + s * omega * rms / L * (w - a)

where rms is the size of the gradient's entries (scale.py): Adam divides by about as much, so that s has no unit here
either. Where no sum is known, ``decay`` stands for s / L. omega is 1, or what is remembered over its mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from epi_ds.anchor_config import AnchorConfig
from epi_ds.errors import UserError


class PullStrength:
    """The strength of one engine's anchor, and the sums of learning rates that it is divided by."""

    def __init__(self, config: AnchorConfig) -> None:
        self._config = config
        self._totals: tuple[float, ...] | None = None
        # Whether `plan` was called for the stage: sums that were not told are a checkpoint's.
        self._was_told = False

    @property
    def is_planned(self) -> bool:
        """Whether the pull of a step is known: its stage is planned, or none has to be."""
        return self._config.strength is None or not self._config.pulls or self._totals is not None

    @property
    def awaits_plan(self) -> bool:
        """Whether `plan` is still to be called for the stage; after a load too, which may go on under another plan."""
        return self._config.strength is not None and self._config.pulls and not self._was_told

    def plan(self, totals: Sequence[float]) -> str | None:
        """Begin a stage whose learning rates add up to ``totals``, one sum per parameter group.

        Within a stage that a checkpoint continues, its own sums stay in force: otherwise the rest of the stage would
        be pulled by another force than its beginning. Returns what to warn of then, or None.

        Raises UserError for a sum that is negative or not finite.
        """
        for total in totals:
            if not (math.isfinite(total) and total >= 0):
                raise UserError(
                    f"the planned learning rates of a parameter group add up to {total}, but an anchor's strength is "
                    "divided by that sum; plan with rates of at least 0, or set anchor.decay instead of anchor.strength"
                )
        planned, continues = tuple(map(float, totals)), self._totals is not None and not self._was_told
        self._was_told = True
        if not continues:
            self._totals = planned
        elif planned != self._totals:
            return (
                f"the checkpoint was saved in a stage whose learning rates add up to {_listed(self._totals)}, and they "
                f"are planned to add up to {_listed(planned)} now; the anchor goes on pulling by the former"
            )
        return None

    def end_stage(self) -> None:
        """Forget the sums: the next stage has its own."""
        self._totals, self._was_told = None, False

    def per_rate(self, group: int) -> float:
        """Return the pull per unit of learning rate for a parameter group: s / L, or ``decay``."""
        config = self._config
        if config.strength is None:
            return config.decay or 0.0
        if not config.strength:
            return 0.0
        total = 0.0 if self._totals is None else self._totals[group]
        # Rates that are all zero move nothing, so there is nothing to pull back.
        return config.strength / total if total else 0.0

    @property
    def totals(self) -> tuple[float, ...] | None:
        """The sums in force, as `restore` takes them."""
        return self._totals

    def restore(self, totals: Sequence[float] | None) -> None:
        """Continue with saved sums; None between two stages."""
        self._totals, self._was_told = None if totals is None else tuple(totals), False


def share_of(exponent: float) -> float:
    """Return the share of the way back that a weight goes, 1 - exp(-exponent). See [Note: strength]."""
    return -math.expm1(-exponent)


def _listed(totals: Sequence[float] | None) -> str:
    return ", ".join(f"{total:g}" for total in totals or ())
