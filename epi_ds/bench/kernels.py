"""How fast the operations are, against an in-place pass over memory of the same size in the same run.

[Note: streams] The yardstick reads and writes 4 bytes an entry of a tensor as long as the operation's, by the same
number of threads. Bytes of an operation are those that it cannot do without: every input read once, every output
written once. Sizes are odd: powers of two alias in the caches of some processors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from epi_ds.isolation.importance import TOP_CODE
from epi_ds.kernels import Stored, chunks, encode_, num_blocks
from epi_ds.kernels.cpu import decode as cpu_decode
from epi_ds.kernels.cpu import observe as cpu_observe
from epi_ds.kernels.cpu import sketch_counts as cpu_sketch_counts
from epi_ds.kernels.reference import codecs
from epi_ds.kernels.reference import observe as reference_observe
from epi_ds.kernels.reference import sketch_counts as reference_sketch_counts

_STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "u16": torch.uint16, "u8": torch.uint8}
_BYTES = {"fp32": 4.0, "bf16": 2.0, "u16": 2.0, "u8": 1.0 + 4 / codecs.BLOCK_NUMEL}
_NUM_EDGES = 256


class KernelRow(NamedTuple):
    """One operation of one backend."""

    op: str
    state: str
    backend: str
    threads: int
    numel: int
    ns_per_element: float
    """Median."""
    gb_per_s: float
    fraction_of_stream: float


class _Case(NamedTuple):
    op: str
    state: str
    backend: str
    bytes_per_entry: float
    run: Callable[[], object]


def measure_kernels(threads: Sequence[int], *, numel: int, repeats: int) -> list[KernelRow]:
    """Measure every operation, state and backend for each number of threads, in turn; medians of ``repeats``."""
    before = torch.get_num_threads()
    try:
        return [row for count in threads for row in _measure(count, numel=numel, repeats=repeats)]
    finally:
        torch.set_num_threads(before)


def _measure(threads: int, *, numel: int, repeats: int) -> list[KernelRow]:
    torch.set_num_threads(threads)
    stream = torch.rand(numel)
    cases = [_Case("stream", "fp32", "torch", 8.0, lambda: stream.mul_(1.0001)), *_cases(numel)]
    seconds: list[list[float]] = [[] for _ in cases]
    # All cases in every round, so that a disturbance meets all alike. The first round warms up.
    for round_number in range(repeats + 1):
        for case, times in zip(cases, seconds, strict=True):
            started = time.perf_counter()
            case.run()
            if round_number:
                times.append(time.perf_counter() - started)
    medians = [statistics.median(times) for times in seconds]
    rates = [case.bytes_per_entry * numel / median / 1e9 for case, median in zip(cases, medians, strict=True)]
    return [
        KernelRow(case.op, case.state, case.backend, threads, numel, median / numel * 1e9, rate, rate / rates[0])
        for case, median, rate in zip(cases, medians, rates, strict=True)
    ]


def _decode_all(decode: Callable[..., object], stored: Stored) -> None:
    """Decode piece by piece, as a refresh does: whole, most of the time would go into the pages of new memory."""
    for start, stop in chunks(0, stored.codes.numel()):
        decode(stored.piece(start, stop))


def _cases(numel: int) -> list[_Case]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(numel, generator=generator).mul_(2).exp_()
    gradient = torch.randn(numel, generator=generator)
    settings: dict[str, Any] = {"ema_decay": 0.99, "inverse_scale": 1.0, "key": 1, "step": 1}
    observes: dict[str, Callable[..., object]] = {"cpu": cpu_observe.observe_, "reference": reference_observe.observe_}
    decodes: dict[str, Callable[..., object]] = {"cpu": cpu_decode.decode, "reference": codecs.decode}
    counts: dict[str, Callable[..., object]] = {
        "cpu": cpu_sketch_counts.sketch_counts,
        "reference": reference_sketch_counts.sketch_counts,
    }
    cases = []
    for state, dtype in _STATES.items():
        scales = torch.zeros(num_blocks(0, numel) if dtype is torch.uint8 else 0)
        stored = Stored(torch.zeros(numel, dtype=dtype), scales, 0)
        encode_(stored, values, key=1, step=0)
        for backend, observe in observes.items():
            run = partial(observe, stored, gradient, **settings)
            cases.append(_Case("observe_", state, backend, 4 + 2 * _BYTES[state], run))
        if dtype is not torch.float32:
            for backend, decode in decodes.items():
                cases.append(_Case("decode", state, backend, _BYTES[state] + 4, partial(_decode_all, decode, stored)))
    codes = values.view(torch.int32)
    first = torch.arange(1, _NUM_EDGES + 1) * (TOP_CODE // _NUM_EDGES)
    later = int(codes.median()) + torch.arange(_NUM_EDGES) * 64
    for name, edges in (("first round", first.int()), ("later round", later.int())):
        for backend, count in counts.items():
            run = partial(count, codes, edges)
            cases.append(_Case(f"sketch_counts, {name}", "fp32", backend, 4, run))
    return cases
