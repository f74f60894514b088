"""The operations of a step and of a refresh, one name each, and `chunks`, in whose pieces they walk a tensor.

Every operation has a plain torch implementation in `epi_ds.kernels.reference`, which is library code: the oracle of
any faster one and what runs where none is available (`dispatch` decides). Callers import the names from here.
"""

from epi_ds.kernels.ops import decode, observe_, sketch_counts
from epi_ds.kernels.reference.chunks import chunks
from epi_ds.kernels.reference.codecs import Stored, encode_, num_blocks
from epi_ds.kernels.reference.hold import hold, restore_
from epi_ds.kernels.reference.mask_bits import count_bits, mask_, masked_sumsq, pack_bits, unpack_bits

__all__ = [
    "Stored",
    "chunks",
    "count_bits",
    "decode",
    "encode_",
    "hold",
    "mask_",
    "masked_sumsq",
    "num_blocks",
    "observe_",
    "pack_bits",
    "restore_",
    "sketch_counts",
    "unpack_bits",
]
