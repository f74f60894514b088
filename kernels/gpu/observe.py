"""`observe_` in one launch for a whole partition; see `epi_ds.kernels.reference.observe`.

Every program looks up in the table whose tile it has: a few dependent reads of lines that all programs share.

Bytes per entry: 4 to read an fp32 gradient (2 of bf16), 4 to write it if it is unscaled, and the importance as in
`epi_ds.kernels.gpu.codecs`: 10.03 for u8 and 16 for fp32 with unscaling. No fewer are possible, as nothing is read or
written twice; of these, 8 are moved by the unscaling alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_ds.kernels.gpu.codecs import (
    ENTRIES,
    FORMATS,
    LARGEST,
    TILE_NUMEL,
    first_scale,
    load_tile,
    plain,
    store_tile,
    tile_of,
)
from epi_ds.kernels.gpu.dither import dither
from epi_ds.kernels.gpu.launch import Specialisation, kernel, launch
from epi_ds.kernels.reference import runs
from epi_ds.kernels.reference.dither import phase

_NUM_COLUMNS = tl.constexpr(runs.NUM_COLUMNS)
# A kernel reads only such globals, and no members of an enumeration.
_FIRST_TILE = tl.constexpr(int(runs.Column.FIRST_TILE))
_START = tl.constexpr(int(runs.Column.START))
_NUMEL = tl.constexpr(int(runs.Column.NUMEL))
_FIRST_CODE = tl.constexpr(int(runs.Column.FIRST_CODE))
_FIRST_BLOCK = tl.constexpr(int(runs.Column.FIRST_BLOCK))
_FIRST_INDEX = tl.constexpr(int(runs.Column.FIRST_INDEX))
_KEY = tl.constexpr(int(runs.Column.KEY))
_GRADIENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def observe_(
    codes: Tensor,
    scales: Tensor,
    gradient: Tensor | None,
    table: Tensor,
    *,
    ema_decay: float,
    inverse_scale: float = 1.0,
    rescale: float = 1.0,
    step: int = 0,
) -> None:
    """See the reference, whose bits these are, but for the pattern of a gradient that is NaN and unscaled.

    Raises ValueError for a gradient that is to be unscaled and not float32.
    """
    rescales = gradient is not None and rescale != 1.0
    if gradient is not None:
        if rescales and gradient.dtype is not torch.float32:
            raise ValueError(f"only a float32 gradient can be unscaled in place, not one of {gradient.dtype}")
        gradient = gradient if gradient.dtype in _GRADIENTS else gradient.float()
    num_runs = table.shape[0]
    # How many tiles there are is known to the device alone. These are enough for a gradient's; with none there may be
    # more, of entries without importance, so programs go on until no tile is left.
    numel = codes.numel() if gradient is None else gradient.numel()
    launch(
        _observe,
        numel // runs.TILE_NUMEL + 2 * num_runs if num_runs else 0,
        plain(codes),
        scales if codes.dtype is torch.uint8 else None,
        gradient,
        table,
        num_runs,
        ema_decay,
        1.0 - ema_decay,
        inverse_scale,
        rescale,
        phase(step),
        FORMAT=FORMATS[codes.dtype],
        RESCALES=rescales,
    )


@kernel
def _observe(
    codes,
    scales,
    gradient,
    table,
    num_runs: tl.int32,
    ema_decay: tl.float32,
    new_share: tl.float32,
    inverse_scale: tl.float32,
    rescale: tl.float32,
    phase: tl.int32,
    FORMAT: tl.constexpr,  # noqa: N803
    RESCALES: tl.constexpr,  # noqa: N803
):
    last_run = table + (num_runs - 1) * _NUM_COLUMNS
    num_tiles = tl.load(last_run + _FIRST_TILE)
    num_tiles += _num_tiles(tl.load(last_run + _FIRST_INDEX), tl.load(last_run + _NUMEL))
    # As a rule a program has one tile, and a few have none.
    for number in range(tl.program_id(0), num_tiles.to(tl.int32), tl.num_programs(0)):
        run = table + _run_of(table, num_runs, number) * _NUM_COLUMNS
        tile = number - tl.load(run + _FIRST_TILE)
        start = tl.load(run + _START)
        numel = tl.load(run + _NUMEL)
        first_code = tl.load(run + _FIRST_CODE)
        first_block = tl.load(run + _FIRST_BLOCK)
        first_index = tl.load(run + _FIRST_INDEX)
        key = tl.load(run + _KEY)

        first, entry, covered, block, touched = tile_of(first_index, numel, tile)
        before = first - first_index
        if RESCALES or first_code >= 0:
            if gradient is not None:
                raw = tl.load(gradient + (start + before) + entry, mask=covered, other=0.0).to(tl.float32)
            if first_code >= 0:
                own_codes = codes + (first_code + before)
                own_scales = scales
                if FORMAT == "u8":
                    own_scales = scales + (first_block + first_scale(first_index, first))
                values = load_tile(own_codes, own_scales, entry, covered, block, touched, FORMAT) * ema_decay
                if gradient is not None:
                    scaled = raw * inverse_scale
                    # NaN, which differs from itself, counts as zero, infinity as the largest finite value. Not by
                    # `maximum`: Triton 3.7's interpreter keeps NaN there, and 3.9's does not.
                    squared = tl.minimum(tl.where(scaled == scaled, scaled * scaled, 0.0), LARGEST)
                    # Two roundings may lift d*max + (1-d)*max above the largest finite value: clamp again.
                    values = tl.minimum(values + squared * new_share, LARGEST)
                random = dither(first, entry, key, phase)
                store_tile(own_codes, own_scales, values, random, entry, covered, block, touched, FORMAT)
            if RESCALES:
                tl.store(gradient + (start + before) + entry, raw * rescale, mask=covered)


@triton.jit
def _num_tiles(first_index, numel):
    return (first_index + numel - 1) // TILE_NUMEL - first_index // TILE_NUMEL + 1


@triton.jit
def _run_of(table, num_runs, number):
    """Return the last run whose first tile is not behind a tile. See [Note: tiles] in reference/runs.py."""
    low = 0
    high = num_runs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + middle * _NUM_COLUMNS + _FIRST_TILE) <= number:
            low = middle
        else:
            high = middle
    return low


def specialisations() -> Iterator[Specialisation]:
    """Yield all that `observe_` may launch."""
    for form, gradient, rescales in product(FORMATS.values(), [None, *_GRADIENTS.values()], [False, True]):
        if rescales and gradient != "fp32":
            continue
        pointers = {"codes": ENTRIES[form], "table": "i64"}
        constants = {"FORMAT": form, "RESCALES": rescales}
        for name, entries in (("scales", "fp32" if form == "u8" else None), ("gradient", gradient)):
            if entries is None:
                constants[name] = None
            else:
                pointers[name] = entries
        name = f"{form} <- {gradient or 'nothing'}{', unscaled' if rescales else ''}"
        yield Specialisation(_observe, name, pointers, constants)
