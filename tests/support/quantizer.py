"""A stand-in for DeepSpeed's CUDA quantizer, so that quantized gradients run on the CPU; the rest of them is real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives
from torch import Tensor


class FourBitQuantizer:
    """What `all_to_all_quant_reduce` uses of the operator, on any device. Codes are int8, not packed in pairs."""

    Symmetric = 0

    def __init__(self) -> None:
        self.calls = 0

    def swizzle_quant(
        self, tensor: Tensor, groups: int, bits: int, kind: int, pipeline: int, nodes: int, devices: int
    ) -> tuple[Tensor, Tensor]:
        """Order a gradient by the device that gets each piece, then by its node; quantize it."""
        self.calls += 1
        return self._quantize(tensor.reshape(nodes, devices, -1).transpose(0, 1), groups)

    def quantized_reduction(
        self, codes: Tensor, scales: Tensor, groups: int, groups_after: int, bits: int, kind: int, devices: int
    ) -> tuple[Tensor, Tensor]:
        """Average what the devices of a node sent, and quantize the average."""
        values = self.dequantize(codes, scales, groups, bits, kind)
        return self._quantize(values.view(devices, -1).mean(0), groups_after)

    def dequantize(self, codes: Tensor, scales: Tensor, groups: int, bits: int, kind: int) -> Tensor:
        return (codes.view(groups, -1).float() * scales.view(groups, 1)).view(-1)

    @staticmethod
    def _quantize(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        rows = values.reshape(groups, -1)
        scales = (rows.abs().amax(1, keepdim=True) / 7).clamp(min=torch.finfo(torch.float32).tiny)
        return (rows / scales).round().to(torch.int8).view(-1), scales.view(-1)


@contextmanager
def two_nodes_of_two() -> Iterator[FourBitQuantizer]:
    """Make four ranks on this machine two nodes, between which DeepSpeed quantizes; within one node it does not."""
    quantizer = FourBitQuantizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coalesced_collectives, "quantizer_module", quantizer)
        # DeepSpeed's count of devices on a CPU node.
        patch.setenv("LOCAL_SIZE", "2")
        yield quantizer
