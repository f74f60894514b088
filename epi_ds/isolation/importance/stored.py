"""Where the importance of this rank's partitions lives, in which format, and how the rest of the house reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from epi_ds.choices import StateFormat
from epi_ds.isolation.importance.codes import codes_of
from epi_ds.isolation.layout import Layout, Segment, pieces_of
from epi_ds.kernels import Run, Stored, chunks, decode, encode_, num_blocks, observe_, table_of, unpack_bits

_DTYPES = {
    StateFormat.FP32: torch.float32,
    StateFormat.BF16: torch.bfloat16,
    StateFormat.U16: torch.uint16,
    StateFormat.U8: torch.uint8,
}


# The codes of a state, as fp32 patterns, are multiples of 1 << shift; see [Note: lattice] in threshold.py.
CODE_SHIFTS: Mapping[StateFormat, int] = {
    StateFormat.FP32: 0,
    StateFormat.ADAM: 0,
    StateFormat.U8: 0,
    StateFormat.U16: 15,
    StateFormat.BF16: 16,
}


class Importance(Protocol):
    """Importance of this rank's covered entries, whoever keeps it."""

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """Return entries ``[start, stop)`` of a segment: fp32 on the home device, finite, not to be written to."""


# Reads entries [start, stop) of a flat partition as fp32; entries that are not covered are zero.
ReadPartition = Callable[[int, int], Tensor]


def code_chunks(importance: Importance, segment: Segment) -> Iterator[Tensor]:
    """Yield the codes of a segment in order, int32, in pieces that keep temporaries small."""
    for start, stop in chunks(0, segment.real_numel):
        yield codes_of(importance.read(segment, start, stop))


def isolated_code_chunks(importance: Importance, segment: Segment, bits: Tensor) -> Iterator[Tensor]:
    """Yield the codes of a segment's isolated entries; ``bits`` are the mask of its sub-group's partition."""
    for start, stop in chunks(0, segment.real_numel):
        mask = unpack_bits(bits, segment.start + start, segment.start + stop)
        yield codes_of(importance.read(segment, start, stop))[mask]


def partition_reader(importance: Importance, segments: Sequence[Segment], device: torch.device) -> ReadPartition:
    """Return a reader of the flat partition that ``segments`` are the covered parts of."""

    def read(start: int, stop: int) -> Tensor:
        values = torch.zeros(stop - start, device=device)
        for segment, first, last in pieces_of(segments, start, stop):
            values[first - start : last - start] = importance.read(segment, first - segment.start, last - segment.start)
        return values

    return read


class Nothing:
    """Importance of nothing: zeros, of which none is ever isolated."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        """``devices`` are the homes of the sub-groups' fp32 partitions."""
        self._devices = devices

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        return torch.zeros(stop - start, device=self._devices[segment.sub_group])


class Larger:
    """The larger of two importances, entry by entry."""

    def __init__(self, one: Importance, other: Importance) -> None:
        self._one, self._other = one, other

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        return torch.maximum(self._one.read(segment, start, stop), self._other.read(segment, start, stop))


class Favoured:
    """Importance as selection sees it under hysteresis: of entries isolated now, divided by a power of two.

    Division by a power of two is exact, so thresholds stay independent of partitioning; it changes who is isolated,
    never how many.
    """

    def __init__(self, importance: Importance, bits: Sequence[Tensor], hysteresis: float) -> None:
        """``bits`` are the masks in force, by sub-group."""
        self._importance = importance
        self._bits = bits
        self._factor = 1.0 / hysteresis

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        values = self._importance.read(segment, start, stop)
        isolated = unpack_bits(self._bits[segment.sub_group], segment.start + start, segment.start + stop)
        favoured = (values * self._factor).clamp_(max=torch.finfo(torch.float32).max)
        return torch.where(isolated, favoured, values)


def dither_key(name: str) -> int:
    """Return the 32 bits that the stochastic rounding of one parameter is drawn from."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def _gap(start: int, stop: int) -> Run:
    """Return a run of a gradient without importance."""
    return Run(start, stop - start, first_code=-1, first_block=0, first_index=0, key=0)


class StoredImportance:
    """Importance of our own: one flat tensor of codes per sub-group, which begin as zeros. Covered entries only."""

    def __init__(
        self, layout: Layout, state: StateFormat, *, devices: Sequence[torch.device], seed: int, purpose: str
    ) -> None:
        """``devices`` are the homes of the sub-groups' fp32 partitions; ``purpose`` gives several states of one run
        random numbers of their own.
        """
        dtype = _DTYPES[state]
        self._codes: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._tables: list[Tensor] = []
        self._runs: dict[str, Run] = {}
        self._stored: dict[str, Stored] = {}
        for segments, numel, device in zip(layout.by_sub_group, layout.sub_group_numel, devices, strict=True):
            runs, num_codes, num_scales, stop = [], 0, 0, 0
            for segment in segments:
                key = dither_key(f"{seed}/{purpose}/{segment.name}")
                run = Run(segment.start, segment.real_numel, num_codes, num_scales, segment.global_start, key)
                runs += [_gap(stop, segment.start), run]
                self._runs[segment.name] = run
                num_codes += run.numel
                num_scales += num_blocks(run.first_index, run.numel) if dtype is torch.uint8 else 0
                stop = segment.stop
            self._tables.append(table_of([*runs, _gap(stop, numel)], device=device))
            # Zero bytes are code zero in every format; not every backend can fill a tensor of uint16.
            codes = torch.zeros(num_codes * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)
            scales = torch.zeros(num_scales, device=device)
            self._codes.append(codes)
            self._scales.append(scales)
            for segment in segments:
                self._stored[segment.name] = self._runs[segment.name].stored_in(codes, scales)

    @property
    def num_bytes(self) -> int:
        """Bytes on this rank."""
        return sum(flat.numel() * flat.element_size() for flat in (*self._codes, *self._scales, *self._tables))

    @property
    def is_counted_by_code(self) -> bool:
        """Whether a refresh had better count codes than entries. See [Note: histograms] in histogram_sketch.py."""
        return all(codes.element_size() == 2 and codes.device.type == "cpu" for codes in self._codes)

    def read(self, segment: Segment, start: int, stop: int) -> Tensor:
        """See `Importance.read`."""
        return decode(self._stored[segment.name].piece(start, stop))

    def stored(self, segment: Segment) -> Stored:
        """Return a segment as it is stored. Not a copy."""
        return self._stored[segment.name]

    def observe(
        self, segment: Segment, gradient: Tensor | None, *, ema_decay: float, inverse_scale: float, step: int
    ) -> None:
        """Let one segment's gradient ([real_numel], on its device) enter; None is a gradient of zero."""
        codes = self._codes[segment.sub_group]
        observe_(
            codes,
            self._scales[segment.sub_group],
            gradient,
            table_of([self._runs[segment.name]._replace(start=0)], device=codes.device),
            ema_decay=ema_decay,
            inverse_scale=inverse_scale,
            step=step,
        )

    def observe_partition(
        self, sub_group: int, gradient: Tensor, *, ema_decay: float, inverse_scale: float, rescale: float, step: int
    ) -> None:
        """Let the gradient of a flat partition enter, and multiply all of it by ``rescale`` in the same pass."""
        observe_(
            self._codes[sub_group],
            self._scales[sub_group],
            gradient,
            self._tables[sub_group],
            ema_decay=ema_decay,
            inverse_scale=inverse_scale,
            rescale=rescale,
            step=step,
        )

    def raise_to(self, segment: Segment, other: Importance, *, step: int) -> None:
        """Replace one segment by the element-wise maximum with ``other``."""
        own, first = self._stored[segment.name], segment.global_start
        # Cut at multiples of the global index, which are borders of uint8 blocks.
        for start, stop in chunks(first, first + segment.real_numel):
            piece = own.piece(start - first, stop - first)
            values = torch.maximum(decode(piece), other.read(segment, start - first, stop - first))
            encode_(piece, values, key=self._runs[segment.name].key, step=step)

    def load(self, segment: Segment, saved: Stored, *, step: int) -> None:
        """Replace one segment: bit for bit where ``saved`` has the same format and blocks, else rounded to them."""
        own = self._stored[segment.name]
        if (saved.codes.dtype, saved.scales.numel(), saved.first_index) == (
            own.codes.dtype,
            own.scales.numel(),
            own.first_index,
        ):
            own.codes.copy_(saved.codes)
            own.scales.copy_(saved.scales)
        else:
            encode_(own, decode(saved).to(own.codes.device), key=self._runs[segment.name].key, step=step)
