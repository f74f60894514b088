"""The second step of a refresh: a look at all importance before there is a budget, where one is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from epi_ds.choices import ADAPTIVE, Selection
from epi_ds.config import EPIConfig
from epi_ds.isolation.mask import Masks
from epi_ds.isolation.search.compare import Comparison
from epi_ds.isolation.search.sketches import sketch_of_isolated
from epi_ds.isolation.search.threshold import Preview

# Scores of tasks are about 1 at the threshold.
_CODE_OF_ONE = 0x3F800000


def take_preview(
    comparison: Comparison, masks: Masks, *, config: EPIConfig, near: Tensor | None, staying: int
) -> Preview | None:
    """Count entries over a first grid, from which the search then goes on; None where none is wanted. Collective then.

    masks    those in force
    near     [rows] int64: where the last search ended, `Thresholds.row_codes`; None before the first
    staying  isolated entries of a mask that may stay, over all ranks; 0 where it may not
    """
    search = comparison.search
    # The selection may have changed since a checkpoint.
    if near is not None and len(near) != search.num_rows:
        near = None
    if near is None and comparison.tasks is not None:
        near = torch.full((search.num_rows,), _CODE_OF_ONE)
    if staying or config.ratio == ADAPTIVE:
        isolated = sketch_of_isolated(comparison.compared, comparison.layout, masks.bits)
        return search.preview(isolated, near=near)
    if comparison.tasks is not None and config.selection is not Selection.PER_LAYER:
        # It is known where the threshold lies, which saves a round.
        return search.preview(None, near=near)
    return None
