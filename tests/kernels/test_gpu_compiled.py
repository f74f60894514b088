"""The Triton kernels compiled for NVIDIA's processors, which needs none of them."""

from __future__ import annotations

import os
import re
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from epi_ds.kernels.dispatch import Backend, backend_on
from epi_ds.kernels.reference.code_histogram import NUM_CODES
from epi_ds.kernels.reference.codecs import Stored
from epi_ds.kernels.reference.runs import Run, table_of
from tests.support.operations import STATES

pytest.importorskip("triton", reason="Triton, which the GPU kernels are written in, is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: Triton interprets and does not compile", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from epi_ds.kernels.gpu import aot
from epi_ds.kernels.gpu.decode import decode
from epi_ds.kernels.gpu.encode import encode_
from epi_ds.kernels.gpu.hold import hold, mask_, restore_
from epi_ds.kernels.gpu.masked_sumsq import masked_sumsq
from epi_ds.kernels.gpu.observe import observe_
from epi_ds.kernels.gpu.pull import pull_
from epi_ds.kernels.gpu.pull_by_code import pull_by_code_
from epi_ds.kernels.gpu.select import select_
from epi_ds.kernels.gpu.sketch_counts import sketch_counts


@pytest.mark.slow
def test_every_kernel_fits_its_processor() -> None:
    """Nothing is spilled, and two programs of 512 threads share a processor with 65536 registers."""
    rows = aot.table()
    assert {row.arch for row in rows} == {80, 90}
    operations = {row.kernel.partition(".")[0] for row in rows}
    assert operations == {
        *("observe", "decode", "encode", "sketch_counts", "masked_sumsq", "select", "hold", "pull", "pull_by_code")
    }
    for row in rows:
        assert row.spill_bytes == 0, row
        assert row.registers <= 64, row
        assert row.shared_bytes <= 8192, row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu_device.py runs the kernels on it")
def test_a_gpu_that_runs_no_kernel_is_noticed_before_a_step_needs_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a missing compiler or driver raises at the first launch is a line in the log, and plain torch runs."""
    backend_on.cache_clear()
    assert backend_on("cuda") is Backend.REFERENCE
    assert "Triton cannot run a kernel" in caplog.text
    backend_on.cache_clear()
    monkeypatch.setenv("EPI_DS_KERNELS", "gpu")
    with pytest.raises(RuntimeError, match="EPI_DS_KERNELS=gpu cannot be had: Triton cannot run a kernel"):
        backend_on("cuda")
    backend_on.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(RuntimeError, match="torch is a build for AMD's"):
        backend_on("cuda")
    backend_on.cache_clear()


@pytest.mark.slow
def test_every_rounding_is_that_of_the_reference() -> None:
    """No product and sum in one rounding, no denormal flushed, no division that is only nearly right."""
    exact, seen = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, set()
    for specialisation, arch in product(aot.specialisations(), aot.ARCHITECTURES):
        text = aot.compiled(specialisation, arch).asm["ptx"]
        found = set(re.findall(r"\b(?:fma|add|sub|mul|div|rcp|sqrt|rsqrt)\.[a-z.]*f32\b", text))
        # A root of uint8 is corrected afterwards, whatever is a little wrong with it: see codecs.py.
        allowed = exact | {"sqrt.approx.ftz.f32"} if specialisation.name.startswith("u8") else exact
        assert found <= allowed, (specialisation.name, arch)
        seen |= found
    assert exact < seen


class NoDriver:
    """Stands in for a GPU's driver as far as Triton asks it before it compiles."""

    def get_current_device(self) -> int:
        # What Triton keeps per device must not be mistaken for that of a real one.
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launch_all(first: int, numel: int, key: int) -> None:
    """Call every operation with every dtype."""
    table = table_of([Run(0, numel, 0, 0, first, key)], device=torch.device("cpu"))
    bits, numbers = torch.zeros(-(-numel // 8), dtype=torch.uint8), torch.zeros(numel, dtype=torch.int32)
    for dtype in STATES:
        codes, scales = torch.zeros(numel, dtype=dtype), torch.zeros(numel)
        gradients: list[Tensor | None] = [
            torch.zeros(numel, dtype=each) for each in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        ]
        for gradient in (*gradients, None):
            observe_(codes, scales, gradient, table, ema_decay=0.9, step=first)
        observe_(codes, scales, gradients[0], table, ema_decay=0.9, inverse_scale=1, rescale=2, step=first)
        decode(Stored(codes, scales, first))
        encode_(Stored(codes, scales, first), torch.zeros(numel), key=key, step=first)
    for values in gradients:
        assert values is not None
        masked_sumsq(values, bits, first_entry=0)
        if values.element_size() < 8:
            held = hold(values, bits, num_isolated=1)
            restore_(values, bits, held)
            mask_(values, bits)
    weights = torch.zeros(numel)
    for anchor in (torch.zeros(numel), torch.zeros(numel, dtype=torch.bfloat16)):
        pull_(weights, weights, anchor, factor=-0.1)
        pull_(weights, weights, anchor, factor=torch.zeros(numel))
        pull_(weights, weights, anchor, factor=-0.1, source=torch.zeros(numel))
        for num_tables, dtype in product((1, 2), (torch.bfloat16, torch.uint16)):
            codes = [torch.zeros(numel, dtype=dtype) for _ in range(num_tables)]
            pull_by_code_(weights, weights, anchor, codes, torch.zeros((num_tables, NUM_CODES)))
    sketch_counts(numbers, torch.arange(min(numel, 100), dtype=torch.int32))
    select_(bits, numbers, bits, threshold_code=key & 0xFFFF, first_entry=first % 8)


def test_what_is_launched_is_what_is_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers and addresses are: Triton's own specialisation on these is off."""
    launched = set()

    def record(**launch: Any) -> bool:
        details = launch["compile"]
        assert not any(any(attributes.values()) for attributes in details["configs"])
        signature = tuple(details["signature"].items())
        constants = tuple(sorted((path[0], value) for path, value in details["constants"].items()))
        launched.add((launch["fn"].name, signature, constants))
        return True

    monkeypatch.setattr(driver, "_active", NoDriver())
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = record
        for first, numel, key in ((0, 1, 1), (16, 4096, 0xFFFFFFFF), (2**34 - 100, 333, 7)):
            launch_all(first, numel, key)
    expected = set()
    for each in aot.specialisations():
        names = [parameter.name for parameter in each.kernel.params]
        constants = tuple(sorted((names.index(name), value) for name, value in each.constants.items()))
        expected.add((each.kernel.__name__, tuple(aot.signature_of(each).items()), constants))
    assert launched == expected
