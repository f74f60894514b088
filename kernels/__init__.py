"""The operations of a step and of a refresh, one name each, and `chunks`, in which they walk a tensor.

Every operation has a plain torch implementation in `epi_ds.kernels.reference`, which is library code: the oracle of
any faster one and what runs where none is available (`dispatch` decides). Callers import the names from here.
"""

from epi_ds.kernels.ops import (
    code_histogram_,
    count_bits,
    decode,
    encode_,
    hold,
    mask_,
    masked_sumsq,
    observe_,
    pull_,
    pull_by_code_,
    restore_,
    select_,
    sketch_counts,
)
from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.code_histogram import NUM_CODES
from epi_ds.kernels.reference.codecs import Stored, num_blocks
from epi_ds.kernels.reference.dither import random_codes
from epi_ds.kernels.reference.mask_bits import pack_bits, set_bits, slice_bits, unpack_bits
from epi_ds.kernels.reference.runs import Run, table_of

__all__ = [
    "NUM_CODES",
    "Run",
    "Stored",
    "chunks",
    "code_histogram_",
    "count_bits",
    "decode",
    "encode_",
    "hold",
    "mask_",
    "masked_sumsq",
    "num_blocks",
    "observe_",
    "pack_bits",
    "pull_",
    "pull_by_code_",
    "random_codes",
    "restore_",
    "select_",
    "set_bits",
    "sketch_counts",
    "slice_bits",
    "table_of",
    "unpack_bits",
]
