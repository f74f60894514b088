"""`hold`, `restore_`, `mask_` and `count_bits` on a GPU; see `epi_ds.kernels.reference.hold`.

[Note: places] Where an isolated entry goes among the held ones is how many come before it: a sum over all tiles before
its own, and one within it. So one kernel counts the isolated entries of every tile, torch adds these up, and a second
kernel moves the entries. The host, which is told how many there are, never waits for a number from the device.

Bytes per entry: 1/8 of mask for each of the two kernels, of which one could be saved, and for an isolated one 2 * 4
(fp32) or 2 * 2 (bf16, fp16) to move it; `mask_` reads the mask once and writes each isolated entry once. Memory moves
in sectors of 32 bytes, so single isolated entries cost up to 8 times (fp32) as much; an entry far from any isolated
one costs nothing but its bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch, num_tiles
from epi_ds.kernels.gpu.mask_bits import isolated

_LANES = tl.constexpr(32)
_TILE_ROWS = tl.constexpr(128)
_TILE_NUMEL = tl.constexpr(128 * 32)
# Entries are moved as the numbers that have their bits, whatever their dtype.
_NUMBERS = {2: torch.int16, 4: torch.int32}


def hold(values: Tensor, bits: Tensor, num_isolated: int) -> Tensor:
    """See the reference, whose bits these are. Entries must be of 2 or 4 bytes."""
    held = values.new_empty(num_isolated)
    _move_(values, bits, held, into_held=True)
    return held


def restore_(values: Tensor, bits: Tensor, held: Tensor) -> None:
    """See the reference, whose bits these are. Entries must be of 2 or 4 bytes."""
    _move_(values, bits, held, into_held=False)


def mask_(values: Tensor, bits: Tensor) -> None:
    """See the reference, whose bits these are. Entries must be of 2 or 4 bytes."""
    launch(_mask, num_tiles(values.numel(), _TILE_NUMEL), _numbers(values), bits, values.numel())


def count_bits(bits: Tensor) -> int:
    """See the reference. The only one here that synchronises with the device."""
    return int(_counts(bits, 8 * bits.numel()).sum())


def _move_(values: Tensor, bits: Tensor, held: Tensor, *, into_held: bool) -> None:
    """Copy isolated entries from or to where they are kept. See [Note: places]."""
    if not held.numel():
        return
    counts = _counts(bits, values.numel())
    places = counts.cumsum(dim=0) - counts
    arguments = _numbers(values), bits, _numbers(held), places, values.numel()
    launch(_move, counts.numel(), *arguments, INTO_HELD=into_held)


def _counts(bits: Tensor, numel: int) -> Tensor:
    """Return how many entries of every tile are isolated. [num_tiles] int32"""
    counts = torch.empty(num_tiles(numel, _TILE_NUMEL), dtype=torch.int32, device=bits.device)
    launch(_count, counts.numel(), bits, counts, numel)
    return counts


def _numbers(values: Tensor) -> Tensor:
    return values.view(_NUMBERS[values.element_size()])


@triton.jit
def _isolated_of_tile(bits, numel):
    """Return the tile's first entry, its entries [128, 32] counted from there, and which of them are isolated."""
    first = tl.program_id(0).to(tl.int64) * _TILE_NUMEL
    entry = tl.arange(0, _TILE_ROWS)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    covered = entry < tl.minimum(numel - first, _TILE_NUMEL).to(tl.int32)
    return first, entry, isolated(bits, first, entry, covered)


@kernel
def _count(bits, counts, numel: tl.int64):
    _, _, mask = _isolated_of_tile(bits, numel)
    tl.store(counts + tl.program_id(0), tl.sum(mask.to(tl.int32)))


@kernel
def _move(values, bits, held, places, numel: tl.int64, INTO_HELD: tl.constexpr):  # noqa: N803
    first, entry, mask = _isolated_of_tile(bits, numel)
    own = values + first + entry
    # How many are isolated in the rows before, and then before the entry in its own row, which one warp has.
    ones = mask.to(tl.int32)
    in_row = tl.sum(ones, axis=1)
    place = (tl.cumsum(in_row) - in_row)[:, None] + tl.cumsum(ones, axis=1) - ones
    kept = held + tl.load(places + tl.program_id(0)) + place
    if INTO_HELD:
        tl.store(kept, tl.load(own, mask=mask), mask=mask)
    else:
        tl.store(own, tl.load(kept, mask=mask), mask=mask)


@kernel
def _mask(values, bits, numel: tl.int64):
    first, entry, mask = _isolated_of_tile(bits, numel)
    tl.store(values + first + entry, tl.zeros([_TILE_ROWS, _LANES], dtype=values.dtype.element_ty), mask=mask)


def specialisations() -> Iterator[Specialisation]:
    """Yield all that these may launch."""
    yield Specialisation(_count, "any", {"bits": "u8", "counts": "i32"}, {})
    for entries in ("i16", "i32"):
        yield Specialisation(_mask, entries, {"values": entries, "bits": "u8"}, {})
        pointers = {"values": entries, "bits": "u8", "held": entries, "places": "i64"}
        for into_held, name in ((True, "held"), (False, "restored")):
            yield Specialisation(_move, f"{entries}, {name}", pointers, {"INTO_HELD": into_held})
