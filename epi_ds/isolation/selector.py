"""From importance to thresholds: what is compared, how much may be isolated, and whether the mask needs to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from epi_ds.config import ADAPTIVE, EPIConfig, Protects
from epi_ds.isolation.adaptive import Drift, covering_budget, drift_of
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.schedule import ratio_at
from epi_ds.isolation.sketch import PartitionSketch, Piece
from epi_ds.isolation.state import (
    CODE_SHIFTS,
    Favoured,
    Importance,
    Larger,
    code_chunks,
    isolated_code_chunks,
)
from epi_ds.isolation.threshold import Exchange, Preview, Thresholds, ThresholdSearch


class Decision(NamedTuple):
    """What a look at the importance led to. The same on every rank."""

    ratio: float
    """The one that is, or would be, requested."""
    drift: Drift | None
    """Of the mask in force; None unless ``refresh_interval: adaptive``, and where nothing is isolated."""
    thresholds: Thresholds | None
    """None where the mask stays."""


class Selector:
    """Searches thresholds as one configuration says. Keeps where the last search ended, and nothing per entry."""

    def __init__(self, layout: Layout, config: EPIConfig) -> None:
        self._layout, self._config = layout, config
        self.last_tau_code: int | None = None
        """Code of the last tau of a global selection, around which a preview is fine; saved with a checkpoint."""

    def unfavoured(self, importance: Importance, *, remembered: Importance | None) -> Importance:
        """Return what selection compares but for hysteresis. Release reads the importance itself."""
        if remembered is None:
            return importance
        return remembered if self._config.protects is Protects.PAST else Larger(importance, remembered)

    def compared(self, unfavoured: Importance, *, masks: Sequence[Tensor]) -> Importance:
        """Return what selection compares. ``masks`` are the bits in force, by sub-group."""
        hysteresis = self._config.hysteresis
        # A copy of the list: its entries are replaced while the new masks are selected.
        return unfavoured if hysteresis == 1.0 else Favoured(unfavoured, tuple(masks), hysteresis)

    def sketch(self, compared: Importance) -> PartitionSketch:
        """Return the sketch of this rank's covered entries."""
        return self._sketch([partial(code_chunks, compared, segment) for segment in self._layout.segments])

    def decide(
        self,
        compared: Importance,
        exchange: Exchange,
        *,
        unfavoured: Importance,
        masks: Sequence[Tensor],
        isolated: int,
        step: int,
        may_stay: bool,
    ) -> Decision:
        """Search the thresholds of a new mask, unless it may stay and has not drifted. Collective.

        unfavoured  what `compared` is without hysteresis: normalisers must not scale the advantage away
        masks     bits in force, by sub-group, with ``isolated`` entries over all ranks
        step      applied steps so far
        may_stay  whether ``refresh_interval: adaptive`` may leave the mask as it is
        """
        config, layout = self._config, self._layout
        search = ThresholdSearch(
            self.sketch(compared),
            exchange,
            normalized_by=self.sketch(unfavoured),
            layer_numel=layout.layer_numel,
            selection=config.selection,
            normalizer=config.normalizer,
            code_shift=CODE_SHIFTS[config.state],
        )
        looks_at_drift = may_stay and config.refresh_interval == ADAPTIVE and isolated > 0
        preview: Preview | None = None
        if looks_at_drift or config.ratio == ADAPTIVE:
            pieces = [
                partial(isolated_code_chunks, compared, segment, masks[segment.sub_group])
                for segment in layout.segments
            ]
            preview = search.preview(self._sketch(pieces), near=self.last_tau_code)
        ratio, budgets = self._budgets(search, preview, step=step)
        drift = None
        if preview is not None and looks_at_drift:
            drift = drift_of(preview, budget=int(budgets), isolated=isolated)
            if max(drift.at_most, drift.growth) <= config.max_drift:
                return Decision(ratio, drift, None)
        thresholds = search.finish(budgets)
        if len(thresholds.row_codes) == 1:
            self.last_tau_code = int(thresholds.row_codes)
        return Decision(ratio, drift, thresholds)

    def _budgets(self, search: ThresholdSearch, preview: Preview | None, *, step: int) -> tuple[float, Tensor]:
        """Return the ratio and what it allows, by the rows of the search."""
        config, numel = self._config, self._layout.covered_numel
        if not isinstance(config.ratio, str):
            ratio = ratio_at(config.ratio, step, warmup_steps=config.warmup_steps)
            return ratio, search.budgets(ratio)
        if preview is None:
            raise RuntimeError("ratio: adaptive without a preview")
        covering = covering_budget(preview, coverage=config.coverage, numel=numel)
        budgets = search.budgets(config.max_ratio).clamp(max=covering)
        return int(budgets) / numel, budgets

    def _sketch(self, codes: Sequence[Callable[[], Iterable[Tensor]]]) -> PartitionSketch:
        """Return the sketch of one reader of codes per segment."""
        segments = self._layout.segments
        pieces = [Piece(s.layer, index, read) for index, (s, read) in enumerate(zip(segments, codes, strict=True))]
        return PartitionSketch(pieces, num_layers=len(self._layout.layer_names))
