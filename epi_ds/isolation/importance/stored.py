"""Where the importance of this rank's partitions lives, and in which format."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from epi_ds.choices import StateFormat
from epi_ds.isolation.importance.views import Importance
from epi_ds.isolation.layout import Segment, parts_within
from epi_ds.isolation.placement import Placement
from epi_ds.kernels import Run, Stored, chunks, decode, encode_, num_blocks, observe_, table_of
from epi_ds.kernels.reference.codecs import PATTERN_SHIFT

_DTYPES = {
    StateFormat.FP32: torch.float32,
    StateFormat.BF16: torch.bfloat16,
    StateFormat.U16: torch.uint16,
    StateFormat.U8: torch.uint8,
}


def code_shift_of(state: StateFormat) -> int:
    """Return the `Importance.code_shift` of what is stored in a format, before there is any."""
    return PATTERN_SHIFT.get(_DTYPES.get(state, torch.float32), 0)


def dither_key(name: str) -> int:
    """Return the 32 bits that the stochastic rounding of one parameter is drawn from."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def _gap(start: int, stop: int) -> Run:
    """Return a run of a gradient without importance."""
    return Run(start, stop - start, first_code=-1, first_block=0, first_index=0, key=0)


class StoredImportance:
    """Importance of our own: one flat tensor of codes per sub-group, which begin as zeros. Covered entries only."""

    def __init__(self, placement: Placement, state: StateFormat, *, seed: int, purpose: str) -> None:
        """Make it of zeros. ``purpose`` gives several states of one run random numbers of their own."""
        dtype, layout = _DTYPES[state], placement.layout
        self.dtype = dtype
        """Of the codes."""
        self._layout = layout
        self.code_shift = code_shift_of(state)
        self._codes: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._tables: list[Tensor] = []
        self._runs: dict[str, Run] = {}
        self._stored: dict[str, Stored] = {}
        homes = zip(layout.by_sub_group, layout.sub_group_numel, placement.devices, strict=True)
        for segments, numel, device in homes:
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
        return decode(self._stored[segment.name].part(start, stop))

    def codes_within(self, sub_group: int, start: int, stop: int) -> Tensor:
        """Return the codes of entries ``[start, stop)`` of a flat partition, all of them covered. Not a copy."""
        codes = self._codes[sub_group]
        for segment, first, _ in parts_within(self._layout.by_sub_group[sub_group], start, stop):
            # The codes of covered neighbours are neighbours.
            first_code = self._runs[segment.name].first_code + first - segment.start
            return codes[first_code : first_code + stop - start]
        return codes[:0]

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
            part = own.part(start - first, stop - first)
            values = torch.maximum(decode(part), other.read(segment, start - first, stop - first))
            encode_(part, values, key=self._runs[segment.name].key, step=step)

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
