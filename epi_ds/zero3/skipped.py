"""Steps skipped because gradients are not finite: a few are loss scaling at work, many are a broken run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from epi_ds.errors import RemedyError

# Names that fit into a sentence.
_SHOWN = 5


class SkippedSteps:
    """Counts steps skipped in a row; the same on every rank, since all skip together."""

    def __init__(self, limit: int, *, newest_checkpoint: Callable[[], Path | None]) -> None:
        """``limit`` is how many are too many; ``newest_checkpoint`` is asked for the last one saved or loaded then."""
        self._limit, self._newest_checkpoint = limit, newest_checkpoint
        self.in_a_row = 0

    @property
    def next_is_too_many(self) -> bool:
        """Whether another skipped step would end the run, so that its gradients are to be looked at."""
        return self.in_a_row + 1 >= self._limit

    def applied(self) -> None:
        """Note an applied step."""
        self.in_a_row = 0

    def skipped(self, suspects: Sequence[str], *, num_parameters: int, loss_scale: float) -> None:
        """Note a skipped step. Collective, and raises RemedyError on all ranks, where it is one too many.

        suspects  parameters of which this rank had a gradient that is not finite
        """
        self.in_a_row += 1
        if self.in_a_row < self._limit:
            return
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, list(suspects))
        names = list(dict.fromkeys(name for own in found for name in own))
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        where = (
            f"in the last one those of {len(names)} of {num_parameters} parameters ({shown})"
            if names
            else "in the last one only their sum over the ranks or over the micro-batches"
        )
        newest = self._newest_checkpoint()
        checkpoint = f"The newest checkpoint is {newest}" if newest else "No checkpoint was saved"
        raise RemedyError(
            f"the last {self.in_a_row} steps were skipped (max_skipped_steps), because gradients are not finite: "
            f"{where}, with loss scale {loss_scale:g}. The weights are those of before; look at the data of these "
            f"steps, and lower the learning rate or the loss scale. {checkpoint}"
        )
