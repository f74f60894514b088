"""From importance to thresholds: what is compared, how much may be isolated, and whether the mask needs to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from epi_ds.config import ADAPTIVE, EPIConfig, Protects
from epi_ds.isolation.adaptive import Drift, covering_ratio, drift_of
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

    def compared(self, importance: Importance, *, remembered: Importance | None, masks: Sequence[Tensor]) -> Importance:
        """Return what selection compares. Release reads the importance itself.

        masks  bits in force, by sub-group
        """
        if remembered is not None:
            past_only = self._config.protects is Protects.PAST
            importance = remembered if past_only else Larger(importance, remembered)
        hysteresis = self._config.hysteresis
        return importance if hysteresis == 1.0 else Favoured(importance, masks, hysteresis)

    def sketch(self, compared: Importance) -> PartitionSketch:
        """Return the sketch of this rank's covered entries."""
        return self._sketch([partial(code_chunks, compared, segment) for segment in self._layout.segments])

    def decide(
        self,
        compared: Importance,
        exchange: Exchange,
        *,
        masks: Sequence[Tensor],
        isolated: int,
        step: int,
        may_stay: bool,
    ) -> Decision:
        """Search the thresholds of a new mask, unless it may stay and has not drifted. Collective.

        masks     bits in force, by sub-group, with ``isolated`` entries over all ranks
        step      applied steps so far
        may_stay  whether ``refresh_interval: adaptive`` may leave the mask as it is
        """
        config, layout = self._config, self._layout
        search = ThresholdSearch(
            self.sketch(compared),
            exchange,
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
        ratio = self._ratio(preview, step=step)
        budgets = search.budgets(ratio)
        drift = None
        if preview is not None and looks_at_drift:
            drift = drift_of(preview, budget=int(budgets), isolated=isolated)
            if drift.at_most <= config.max_drift:
                return Decision(ratio, drift, None)
        thresholds = search.finish(budgets)
        if len(thresholds.row_codes) == 1:
            self.last_tau_code = int(thresholds.row_codes)
        return Decision(ratio, drift, thresholds)

    def _ratio(self, preview: Preview | None, *, step: int) -> float:
        config = self._config
        if not isinstance(config.ratio, str):
            return ratio_at(config.ratio, step, warmup_steps=config.warmup_steps)
        if preview is None:
            raise RuntimeError("ratio: adaptive without a preview")
        numel = self._layout.covered_numel
        return covering_ratio(preview, coverage=config.coverage, numel=numel, largest=config.max_ratio)

    def _sketch(self, codes: Sequence[Callable[[], Iterable[Tensor]]]) -> PartitionSketch:
        """Return the sketch of one reader of codes per segment."""
        segments = self._layout.segments
        pieces = [Piece(s.layer, index, read) for index, (s, read) in enumerate(zip(segments, codes, strict=True))]
        return PartitionSketch(pieces, num_layers=len(self._layout.layer_names))
