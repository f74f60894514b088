"""How every kernel is launched, and what has to be known to compile it without launching it.

[Note: specialisations] Triton compiles a kernel once for every combination of dtypes, constants and, by default, of
which pointers and integers happen to be multiples of 16. The last of these is turned off by `kernel`: what `aot`
compiles is all that ever runs, no step late in a training waits for a compiler, and a view that begins at an odd entry
is as fast as any other. The price is one load per entry instead of one per 16 bytes. Neighbouring threads still read
neighbouring entries, so what is moved stays the same. No kernel is tuned by trying: they work in place, and a second
try would count twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS: dict[str, Any] = {
    # A program has 4096 entries, so a thread has 8: enough reads at once to wait for memory only once.
    "num_warps": 16,
    # What lets two such programs share a processor with 65536 registers, so that one reads while the other computes.
    "maxnreg": 64,
    # No loop here is worth a software pipeline.
    "num_stages": 1,
    # A product and a sum stay two roundings, as in the reference.
    "enable_fp_fusion": False,
}
"""What the compiler is told, ahead of time and at launch."""


class Specialisation(NamedTuple):
    """One kernel for one set of dtypes and constants."""

    kernel: Any
    """What `kernel` returned."""
    name: str
    pointers: dict[str, str]
    """Of every pointer the type of its entries as Triton spells it, such as ``fp32``."""
    constants: dict[str, Any]
    """Of every other parameter that is not annotated with its type. None stands for a pointer that is not given."""


def kernel(function: Callable[..., None]) -> Any:
    """Make a kernel of a function, without variants for aligned arguments: see [Note: specialisations]."""
    parameters = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(do_not_specialize=parameters, do_not_specialize_on_alignment=parameters)(function)


def num_tiles(numel: int, tile_numel: tl.constexpr) -> int:
    """Return how many programs it takes if each has one tile."""
    return -(-numel // int(tile_numel.value))


def launch(function: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its tensors, if there is anything to do. Synchronises with nothing.

    Raises ValueError for a tensor that is not in one piece.
    """
    if not num_programs:
        return
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} and stride {tensor.stride()} is not in one piece"
            )
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(tensors[0]):
        function[(num_programs,)](*arguments, **constants, **OPTIONS)
