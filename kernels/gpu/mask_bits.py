"""Reading isolation masks in kernels; see `epi_ds.kernels.reference.mask_bits`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def isolated(bits, first, entry, covered):
    """Return which entries are isolated; False where they are not covered.

    bits   of the mask's entry 0, a pointer
    first  number of the mask's entry that is entry 0 here, int64
    entry  int32
    """
    # Eight neighbours read the same byte, which is one request: the threads of a warp are served together.
    shift = entry + (first & 7).to(tl.int32)
    byte = tl.load(bits + (first >> 3) + (shift >> 3), mask=covered, other=0).to(tl.int32)
    return ((byte >> (shift & 7)) & 1) != 0
