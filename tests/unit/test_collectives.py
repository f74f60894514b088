"""Transports over real ranks: identical bits from all, and what the model says they send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from epi_ds.choices import Normalizer, Selection, Transport
from epi_ds.isolation.search.collectives import GroupExchange
from epi_ds.isolation.search.threshold import find_thresholds
from epi_ds.isolation.search.traffic import TYPICAL_KINDS, cost_of, refresh_messages
from tests.support.ranks import run_ranks
from tests.support.worlds import CountingExchange, cut

CPU = torch.device("cpu")
CASES = [
    (Selection.NORMALIZED_GLOBAL, Normalizer.MINMAX),
    (Selection.NORMALIZED_GLOBAL, Normalizer.MEAN),
    (Selection.RAW_GLOBAL, Normalizer.MINMAX),
    (Selection.PER_LAYER, Normalizer.MINMAX),
]
SHIFTS = (0, 14, 16)


def layers_of() -> list[np.ndarray]:
    """Five layers of odd sizes whose values are on every lattice, with ties."""
    rng = np.random.default_rng(2)
    drawn = [np.exp(rng.normal(0, 2, size)).astype(np.float32) for size in (1, 300, 17, 1001, 64)]
    return [(values.view(np.int32) & ~0xFFFF).view(np.float32) for values in drawn]


def transports_of(selection: Selection) -> list[Transport]:
    transports = [Transport.ALL_GATHER, Transport.ALL_REDUCE]
    return [*transports, Transport.REDUCE_SCATTER] if selection is Selection.PER_LAYER else transports


def search_everywhere() -> list[tuple[Any, ...]]:
    """On every rank: thresholds and traffic of all selections, states and transports, in one order."""
    layers, found = layers_of(), []
    numel = tuple(len(values) for values in layers)
    for selection, normalizer in CASES:
        for code_shift in SHIFTS:
            for transport in transports_of(selection):
                exchange = GroupExchange(None, device=CPU, transport=transport)
                world = cut(layers, exchange.world_size, np.random.default_rng(1), empty=0.3)
                thresholds = find_thresholds(
                    world.parts[exchange.rank],
                    exchange,
                    ratio=0.1,
                    layer_numel=numel,
                    selection=selection,
                    normalizer=normalizer,
                    code_shift=code_shift,
                )
                # The report of a refresh.
                exchange.total(torch.zeros(2 * (len(layers) + TYPICAL_KINDS) + 2, dtype=torch.int32))
                found.append((thresholds.codes.tolist(), thresholds.tied_mass, *exchange.traffic))
    return found


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_all_transports_find_the_same_and_send_what_the_model_says(world_size: int) -> None:
    results = run_ranks(search_everywhere, world_size)
    assert all(result == results[0] for result in results)
    remaining = iter(results[0])
    layers = layers_of()
    numel = tuple(len(values) for values in layers)
    for selection, normalizer in CASES:
        for code_shift in SHIFTS:
            settings: dict[str, Any] = {"selection": selection, "normalizer": normalizer, "code_shift": code_shift}
            alone = find_thresholds(
                cut(layers, 1, np.random.default_rng(0)),  # type: ignore[arg-type]
                CountingExchange(),
                ratio=0.1,
                layer_numel=numel,
                **settings,
            )
            for transport in transports_of(selection):
                codes, tied_mass, collectives, sent_bytes = next(remaining)
                assert (codes, tied_mass) == (alone.codes.tolist(), alone.tied_mass), (settings, transport)
                cost = cost_of(refresh_messages(numel, **settings), transport=transport, world_size=world_size)
                assert (collectives, sent_bytes) == (cost.collectives, cost.sent_bytes), (settings, transport)
                assert 2 <= collectives <= 8
    assert next(remaining, None) is None


def merge_small(transport: Transport) -> list[Tensor]:
    exchange = GroupExchange(None, device=CPU, transport=transport)
    rank = exchange.rank
    counts = torch.tensor([[5, 3, rank], [2**33 + rank, 1, 0]])
    kept = counts.clone()
    merged = [
        exchange.maximum(torch.tensor([rank, -rank])),
        exchange.total(counts),
        exchange.total(counts[:1].int()),
        *exchange.answers(counts.clone(), torch.tensor([9, 3])),
    ]
    assert torch.equal(counts, kept), "merging changed what it was given"
    return merged


@pytest.mark.parametrize("transport", [Transport.ALL_GATHER, Transport.ALL_REDUCE, Transport.REDUCE_SCATTER])
def test_merged_integers(transport: Transport) -> None:
    """Three ranks, two rows: one of them owns nothing."""
    for maximum, total, narrow, first, at_or_above, previous in run_ranks(merge_small, 3, transport):
        assert maximum.tolist() == [2, 0]
        assert total.tolist() == [[15, 9, 3], [3 * 2**33 + 3, 3, 0]]
        assert narrow.tolist() == [[15, 9, 3]]
        assert (first.tolist(), at_or_above.tolist()) == ([1, 1], [9, 3])
        assert previous.tolist() == [15, 3 * 2**33 + 3]


def peak_bytes(num_layers: int) -> dict[str, int]:
    """Largest growth of this process's memory during a search over many layers, by transport."""
    peaks = {}
    for selection, transport in [
        (Selection.PER_LAYER, Transport.REDUCE_SCATTER),
        (Selection.PER_LAYER, Transport.ALL_REDUCE),
        (Selection.NORMALIZED_GLOBAL, Transport.ALL_REDUCE),
    ]:
        world = cut([np.ones(20, dtype=np.float32)] * num_layers, 1, np.random.default_rng(0))
        exchange = GroupExchange(None, device=CPU, transport=transport)
        # Linux: 5 resets the high-water mark of the resident memory to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        find_thresholds(
            world.parts[0],
            exchange,
            ratio=0.1,
            layer_numel=(20 * exchange.world_size,) * num_layers,
            selection=selection,
            normalizer=Normalizer.MINMAX,
        )
        peaks[f"{selection.value} {transport.value}"] = _status_bytes("VmHWM") - before
    return peaks


def _status_bytes(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def test_a_thousand_layers_take_at_most_64_mb() -> None:
    """Measured, the backend's buffers included. The edges alone would be 16 MB a round as 64-bit integers."""
    # Pages of libraries are resident once they were used, and in a forked process none has been.
    run_ranks(peak_bytes, 2, 10)
    for peaks in run_ranks(peak_bytes, 2, 1000):
        print(peaks)
        assert all(peak <= 64e6 for peak in peaks.values()), peaks
        # Fails if the measurement sees nothing: the counts of a per_layer round alone are 16 MB.
        assert peaks["per_layer reduce_scatter"] >= 16e6


def test_an_exchange_needs_a_transport() -> None:
    with pytest.raises(ValueError, match="got auto"):
        GroupExchange(None, device=CPU, transport=Transport.AUTO)
