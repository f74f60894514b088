"""How fast the operations are, against an in-place pass over memory of the same size in the same run.

[Note: streams] The yardstick reads and writes 4 bytes an entry of a tensor as long as the operation's, by the same
number of threads. Bytes of an operation are those that it cannot do without: every input read once, every output
written once. Sizes are odd: powers of two alias in the caches of some processors.

[Note: chunks] The plain torch implementations, eager and under torch.compile, walk a tensor in chunks that stay in the
caches, as they do in use; the compiled ones are compiled for one chunk, or its code would be as long as the tensor.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_ds.bench.one_rank import OneRank
from epi_ds.choices import Normalizer, Selection, StateFormat
from epi_ds.isolation.importance.codes import TOP_CODE
from epi_ds.isolation.importance.stored import StoredImportance
from epi_ds.isolation.layout import Layout, Segment
from epi_ds.isolation.placement import Placement
from epi_ds.isolation.search.sketches import sketch_of
from epi_ds.isolation.search.threshold import find_thresholds
from epi_ds.kernels import Run, Stored, chunks, encode_, num_blocks, pack_bits, table_of
from epi_ds.kernels.reference.code_histogram import NUM_CODES
from epi_ds.kernels.reference.codecs import BLOCK_NUMEL

_STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "u16": torch.uint16, "u8": torch.uint8}
_BYTES = {"fp32": 4.0, "bf16": 2.0, "u16": 2.0, "u8": 1.0 + 4 / BLOCK_NUMEL}
_NUM_EDGES = 256
_CODE_OF_ONE = 0x3F800000
# Distance of isolated entries: they are 1 %.
_APART = 101
_SETTINGS: dict[str, Any] = {"ema_decay": 0.99, "inverse_scale": 1.0, "step": 1}
_COMPILED = "torch.compile"


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


def measure_kernels(threads: Sequence[int], *, numel: int, repeats: int, device: str = "cpu") -> list[KernelRow]:
    """Measure every operation, state and backend for each number of threads, in turn; medians of ``repeats``.

    ``device`` is "cpu" or "cuda"; threads mean nothing to the second.
    """
    before = torch.get_num_threads()
    try:
        return [
            row
            for count in threads
            for row in _measure(count, numel=numel, repeats=repeats, device=torch.device(device))
        ]
    finally:
        torch.set_num_threads(before)


def _measure(threads: int, *, numel: int, repeats: int, device: torch.device) -> list[KernelRow]:
    torch.set_num_threads(threads)
    # Compiled code has the number of threads in it.
    torch.compiler.reset()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    stream = torch.rand(numel, device=device)
    cases = [_Case("stream", "fp32", "torch", 8.0, lambda: stream.mul_(1.0001)), *_cases(numel, device)]
    seconds: list[list[float]] = [[] for _ in cases]
    # All cases in every round, so that a disturbance meets all alike. The first rounds warm up and compile.
    for round_number in range(-2, repeats):
        for case, times in zip(cases, seconds, strict=True):
            wait()
            started = time.perf_counter()
            case.run()
            wait()
            if round_number >= 0:
                times.append(time.perf_counter() - started)
    medians = [statistics.median(times) for times in seconds]
    rates = [case.bytes_per_entry * numel / median / 1e9 for case, median in zip(cases, medians, strict=True)]
    return [
        KernelRow(case.op, case.state, case.backend, threads, numel, median / numel * 1e9, rate, rate / rates[0])
        for case, median, rate in zip(cases, medians, rates, strict=True)
    ]


class _Entries(NamedTuple):
    """What the operations work on."""

    stored: Stored
    gradient: Tensor
    values: Tensor
    bits: Tensor
    """One of every hundred entries is isolated, equally far apart."""
    selected: Tensor
    """Another mask, to be written to."""
    held: Tensor
    anchor: Tensor
    """bf16, beside ``values``."""
    other_codes: Tensor
    """As ``stored`` has them, of other values."""
    table: Tensor

    def chunk(self, start: int, stop: int) -> _Entries:
        """Return a part. It begins as the whole does, so that one compiled function serves all parts."""
        num_isolated = len(range(0, stop - start, _APART))
        return _Entries(
            self.stored.part(start, stop)._replace(first_index=0),
            self.gradient[start:stop],
            self.values[start:stop],
            self.bits[: -(-(stop - start) // 8)],
            self.selected[start // 8 : -(-stop // 8)],
            self.held[:num_isolated],
            self.anchor[start:stop],
            self.other_codes[start:stop],
            self.table,
        )


class _Operation(NamedTuple):
    name: str
    module: str
    bytes_per_entry: float
    call: Callable[[Any, _Entries], object]
    """On the module of a backend."""
    compiled_call: Callable[[Any, _Entries], object] | None = None
    """On the module of the reference, where another one has to be compiled."""


def _observe(module: Any, entries: _Entries) -> None:
    stored = entries.stored
    module.observe_(stored.codes, stored.scales, entries.gradient, entries.table, rescale=0.999, **_SETTINGS)


def _observe_run(module: Any, entries: _Entries) -> None:
    # The table is read by the host, which cannot be compiled.
    module.observe_run_(entries.stored, entries.gradient, key=1, **_SETTINGS)
    entries.gradient.mul_(0.999)


def _operations(state: str, device: torch.device) -> Iterator[_Operation]:
    size = _BYTES[state]
    yield _Operation("observe_", "observe", 8 + 2 * size, _observe, _observe_run)
    if state != "fp32":
        yield _Operation("decode", "decode", size + 4, lambda module, of: module.decode(of.stored))
        yield _Operation(
            "encode_", "encode", size + 4, lambda module, of: module.encode_(of.stored, of.values, key=1, step=1)
        )
        if state != "u8":
            yield from _by_code(size, device)
        return
    yield _Operation(
        "masked_sumsq",
        "masked_sumsq",
        4 + 1 / 8,
        lambda module, of: module.masked_sumsq(of.gradient, of.bits, first_entry=0),
    )
    yield _Operation(
        "select_",
        "select",
        4 + 2 / 8,
        lambda module, of: module.select_(
            of.selected, of.values.view(torch.int32), of.bits, threshold_code=_CODE_OF_ONE, first_entry=0
        ),
    )
    # An entry is read at one place and written at another.
    moved = 1 / 8 + 2 * 4 / _APART
    yield _Operation("hold", "hold", moved, lambda module, of: module.hold(of.values, of.bits, of.held.numel()))
    yield _Operation("restore_", "hold", moved, lambda module, of: module.restore_(of.values, of.bits, of.held))
    yield _Operation("mask_", "hold", 1 / 8 + 4 / _APART, lambda module, of: module.mask_(of.gradient, of.bits))
    yield _Operation(
        "pull_", "pull", 4 + 2 + 4, lambda module, of: module.pull_(of.values, of.values, of.anchor, -1e-4)
    )
    for name, edges in (
        ("first round", torch.arange(1, _NUM_EDGES + 1) * (TOP_CODE // _NUM_EDGES)),
        ("later round", _CODE_OF_ONE + torch.arange(_NUM_EDGES) * 64),
    ):
        yield _Operation(f"sketch_counts, {name}", "sketch_counts", 4, partial(_count, edges.int()))


def _by_code(size: float, device: torch.device) -> Iterator[_Operation]:
    """Yield what reads 16-bit codes as they are: a histogram, and pulls by one state and by the stronger of two."""
    if device.type == "cpu":
        bins = torch.zeros(NUM_CODES, dtype=torch.int64)
        yield _Operation(
            "code_histogram_",
            "code_histogram",
            size,
            lambda module, of: module.code_histogram_(bins, of.stored.codes),
        )
    factors = torch.rand((2, NUM_CODES), device=device).mul_(-1e-4)
    yield _Operation(
        "pull_by_code_",
        "pull_by_code",
        4 + 2 + 4 + size,
        lambda module, of: module.pull_by_code_(of.values, of.values, of.anchor, [of.stored.codes], factors[:1]),
    )
    yield _Operation(
        "pull_by_code_, of two states",
        "pull_by_code",
        4 + 2 + 4 + 2 * size,
        lambda module, of: module.pull_by_code_(
            of.values, of.values, of.anchor, [of.stored.codes, of.other_codes], factors
        ),
    )


def _count(edges: Tensor, module: Any, entries: _Entries) -> object:
    return module.sketch_counts(entries.values.view(torch.int32), edges.to(entries.values.device))


def _entries(state: str, numel: int, device: torch.device) -> _Entries:
    torch.manual_seed(0)
    values = torch.randn(numel, device=device).mul_(2).exp_()
    mask = torch.zeros(numel, dtype=torch.bool, device=device)
    mask[::_APART] = True
    bits = torch.zeros(-(-numel // 8), dtype=torch.uint8, device=device)
    pack_bits(mask, bits)
    return _Entries(
        _stored(_STATES[state], values),
        torch.randn(numel, device=device),
        values,
        bits,
        torch.zeros_like(bits),
        values[::_APART].clone(),
        values.bfloat16(),
        _stored(_STATES[state], values.flip(0)).codes,
        table_of([Run(0, numel, 0, 0, 0, 1)], device=device),
    )


def _stored(dtype: torch.dtype, values: Tensor) -> Stored:
    numel, device = values.numel(), values.device
    scales = torch.zeros(num_blocks(0, numel) if dtype is torch.uint8 else 0, device=device)
    codes = torch.zeros(numel * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)
    stored = Stored(codes, scales, 0)
    encode_(stored, values, key=1, step=0)
    return stored


def _cases(numel: int, device: torch.device) -> Iterator[_Case]:
    ours = "cpu" if device.type == "cpu" else "gpu"
    for state in _STATES:
        entries = _entries(state, numel, device)
        cut = [entries.chunk(start, stop) for start, stop in chunks(0, numel)]
        for operation in _operations(state, device):
            for backend in (ours, "reference", _COMPILED):
                module = importlib.import_module(
                    f"epi_ds.kernels.{'reference' if backend == _COMPILED else backend}.{operation.module}"
                )
                if backend == _COMPILED:
                    call = torch.compile(operation.compiled_call or operation.call)
                    run: Callable[[], object] = partial(_each, call, module, cut)
                elif operation.name in ("decode", "encode_"):
                    # As they are in use: whole, most of the time would go into the pages of new memory.
                    run = partial(_each, operation.call, module, cut)
                else:
                    run = partial(operation.call, module, entries)
                yield _Case(operation.name, state, backend, operation.bytes_per_entry, run)
        yield _Case("global search", state, ours, _BYTES[state], partial(_search, *_importance(state, numel, device)))
    yield from _optimizers(numel, device)


def _each(call: Callable[[Any, _Entries], object], module: Any, cut: Sequence[_Entries]) -> None:
    for chunk in cut:
        call(module, chunk)


def _importance(state: str, numel: int, device: torch.device) -> tuple[StoredImportance, Layout]:
    """Return log-normal importance of one parameter on one rank."""
    segment = Segment(
        name="weight",
        layer=0,
        sub_group=0,
        start=0,
        real_numel=numel,
        partition_numel=numel,
        global_start=0,
        shape=(numel,),
    )
    layout = Layout(segments=(segment,), layer_names=("weight",), sub_group_numel=(numel,))
    importance = StoredImportance(Placement(layout, (device,)), StateFormat(state), seed=0, purpose="bench")
    encode_(importance.stored(segment), torch.randn(numel, device=device).mul_(2).exp_(), key=1, step=0)
    return importance, layout


def _search(importance: StoredImportance, layout: Layout) -> None:
    """Find the threshold of a refresh: all counting there is in one, and nothing else."""
    find_thresholds(
        sketch_of(importance, layout),
        OneRank(),
        ratio=0.01,
        layer_numel=layout.layer_numel,
        selection=Selection.NORMALIZED_GLOBAL,
        normalizer=Normalizer.MINMAX,
        code_shift=importance.code_shift,
    )


def _optimizers(numel: int, device: torch.device) -> Iterator[_Case]:
    """Yield whole optimizer steps, to compare with: they read and write weights and moments, and read gradients."""
    parameter = torch.nn.Parameter(torch.randn(numel, device=device))
    parameter.grad = torch.randn(numel, device=device)
    fused = torch.optim.AdamW([parameter], lr=1e-9, fused=True)
    yield _Case("AdamW, fused", "fp32", "torch", 28, fused.step)
    if device.type == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        yield _Case("DeepSpeedCPUAdam", "fp32", "deepspeed", 28, DeepSpeedCPUAdam([parameter], lr=1e-9).step)
