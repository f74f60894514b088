"""What settings make of the layers of a model: whether a mask can isolate anything, and what a refresh exchanges."""

from __future__ import annotations

from epi_ds.choices import PolicyName, Selection, Transport
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError
from epi_ds.isolation.importance.stored import code_shift_of
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.policies.half import still_half
from epi_ds.isolation.schedule import largest_ratio
from epi_ds.isolation.search.threshold import budget_of
from epi_ds.isolation.search.traffic import Cost, compare, cost_of, pick, refresh_messages


def check_budget(layout: Layout, config: EPIConfig) -> None:
    """Raise UserError where a mask of these settings could never isolate an entry of these layers."""
    # A mask that is loaded has the size it was saved with.
    ratio = largest_ratio(config)
    if ratio == 0 or config.policy is PolicyName.NONE or config.mask_from is not None:
        return
    if config.policy is PolicyName.HALF:
        if not still_half(layout.segments, name=""):
            raise UserError(
                "policy: half chooses among matrices that lie beside each other in numbered blocks, and none of the "
                f"{len(layout.segments)} covered parameters do; cover more, or set another policy"
            )
        return
    per_layer = config.selection is Selection.PER_LAYER
    sizes = layout.layer_numel if per_layer else (layout.covered_numel,)
    if not any(budget_of(ratio, size) for size in sizes):
        raise UserError(
            f"ratio {ratio} of {'every layer' if per_layer else 'the covered parameters'} (at most {max(sizes)} "
            "entries) is less than one entry, so nothing would ever be isolated; raise ratio or cover more"
        )


def refresh_cost(layout: Layout, config: EPIConfig, *, world_size: int) -> Cost:
    """Return what a refresh costs every rank by the configured transport, or by what ``auto`` picks.

    The same on every rank.
    """
    messages = refresh_messages(
        layout.layer_numel,
        selection=config.selection,
        normalizer=config.normalizer,
        code_shift=code_shift_of(config.state),
        kind_numel=layout.group_numel[len(layout.layer_numel) :],
    )
    if config.exchange is not Transport.AUTO:
        return cost_of(messages, transport=config.exchange, world_size=world_size)
    costs = compare(messages, selection=config.selection, world_size=world_size)
    if not config.has_room_for_answers:
        # See `EPIConfig._check_exchange`.
        costs = tuple(cost for cost in costs if cost.transport is not Transport.REDUCE_SCATTER)
    return pick(costs)
