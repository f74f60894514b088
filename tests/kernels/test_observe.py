"""`observe_` in C++: the bits of the plain torch implementation, for every instruction set and number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from epi_ds.kernels import Run, Stored, num_blocks, table_of
from epi_ds.kernels.cpu.observe import observe_ as compiled
from epi_ds.kernels.reference.observe import observe_ as reference
from tests.support.covering import covering
from tests.support.operations import SIZES, STATES, runnable_variants, same_bits, state_of, table_for


def gradient_of(numel: int) -> Tensor:
    gradient = torch.randn(numel + 3, generator=torch.Generator().manual_seed(1))[3:]
    if numel > 250:
        gradient[7:12] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 1e-30])
    return gradient


def same(one: Stored, other: Stored) -> bool:
    """Whether codes and scales are equal, bit for bit."""
    return same_bits(one.codes, other.codes) and same_bits(one.scales, other.scales)


# Every instruction set has code of its own for every state and gradient; a fault may show at one size only.
@pytest.mark.parametrize(
    ("variant", "dtype", "numel", "gradient_dtype"),
    covering(runnable_variants(), STATES, SIZES, [torch.float32, torch.bfloat16, torch.float16, None], strength=3),
)
def test_bits_are_those_of_the_reference(
    variant: str, dtype: torch.dtype, numel: int, gradient_dtype: torch.dtype | None
) -> None:
    gradient = None if gradient_dtype is None else gradient_of(numel).to(gradient_dtype)
    # On and off a border of a block, odd, and where the upper half of the index counts.
    for first_index in (0, 1, 77, 2**34 - 100)[: 4 if numel < 2**20 else 2]:
        expected, found = state_of(dtype, numel, first_index), state_of(dtype, numel, first_index)
        table = table_for(expected, key=0xF0000001)
        for step in range(2):
            settings: dict[str, Any] = {"ema_decay": 0.9, "inverse_scale": 0.25, "rescale": 1.0, "step": step}
            reference(*expected[:2], gradient, table, **settings)
            compiled(*found[:2], gradient, table, variant=variant, **settings)
        assert same(expected, found)


class Partition(NamedTuple):
    """Importance of several parameters in one flat partition, and its gradient."""

    codes: Tensor
    scales: Tensor
    gradient: Tensor
    table: Tensor


def partition_of(dtype: torch.dtype, sizes: Sequence[int]) -> Partition:
    """Parameters of some sizes, with entries between them that belong to none."""
    runs, states, gap, start = [], [], 13, 0
    for index, numel in enumerate(sizes):
        stored = state_of(dtype, numel, first_index=1000 * index)
        num_codes = sum(state.codes.numel() for state in states)
        blocks = sum(num_blocks(s.first_index, s.codes.numel()) for s in states) if dtype is torch.uint8 else 0
        runs += [Run(start, gap, -1, 0, 0, 0), Run(start + gap, numel, num_codes, blocks, stored.first_index, index)]
        states.append(stored)
        start += gap + numel
    if dtype is torch.uint16:
        codes = torch.cat([state.codes.view(torch.int16) for state in states]).view(torch.uint16)
    else:
        codes = torch.cat([state.codes for state in states])
    scales = torch.cat([state.scales for state in states])
    return Partition(codes, scales, gradient_of(start), table_of(runs, device=codes.device))


@pytest.mark.parametrize(
    ("variant", "dtype", "sizes", "num_threads"),
    covering(runnable_variants(), STATES, [(0,), (1, 0, 2), (300, 5000, 1, 0, 70_001)], [1, 2, 3, 4], strength=3),
    ids=str,
)
def test_a_whole_partition_is_observed_and_unscaled_in_one_pass(
    variant: str, dtype: torch.dtype, sizes: tuple[int, ...], num_threads: int
) -> None:
    expected, found = partition_of(dtype, sizes), partition_of(dtype, sizes)
    raw = expected.gradient.clone()
    settings: dict[str, Any] = {"ema_decay": 0.9, "inverse_scale": 0.5, "rescale": 0.3, "step": 4}
    reference(*expected, **settings)
    compiled(*found, variant=variant, num_threads=num_threads, **settings)
    assert all(same_bits(one, other) for one, other in zip(expected[:3], found[:3], strict=True))
    # Entries between the parameters are unscaled too, and none of them twice.
    assert same_bits(found.gradient, raw * 0.3)


def test_a_gradient_that_cannot_be_rescaled_in_place_is_refused() -> None:
    stored = state_of(torch.float32, 10, 0)
    for gradient in (torch.zeros(10, dtype=torch.bfloat16), torch.zeros(20)[::2]):
        with pytest.raises(ValueError, match="cannot be rescaled in place"):
            compiled(*stored[:2], gradient, table_for(stored), ema_decay=0.9, inverse_scale=1.0, rescale=0.5, step=0)


def test_a_gradient_shorter_than_its_table_is_refused() -> None:
    """Behind it lies other memory, which would be rescaled."""
    memory = torch.ones(20)
    table = table_of([Run(0, 10, -1, 0, 0, 0)], device=memory.device)
    with pytest.raises(ValueError, match="4 entries has not the 10 that its table covers"):
        compiled(torch.zeros(0), torch.zeros(0), memory[:4], table, ema_decay=0.9, inverse_scale=1, rescale=0.5, step=0)
    assert memory.eq(1).all()


@pytest.mark.parametrize("dtype", STATES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    gradient, states = gradient_of(100_003), []
    for num_threads in (1, 2, 3, 4):
        stored = state_of(dtype, 100_003, 77)
        settings: dict[str, Any] = {"ema_decay": 0.99, "inverse_scale": 1.0, "rescale": 1.0, "step": 1}
        compiled(*stored[:2], gradient, table_for(stored, key=5), num_threads=num_threads, **settings)
        states.append(stored)
    assert all(same(states[0], state) for state in states[1:])


@pytest.mark.parametrize("dtype", STATES)
def test_the_operation_is_registered_as_it_behaves(dtype: torch.dtype) -> None:
    """torch's own check of the schema: what is mutated, what shapes come out, under a compiler too."""
    stored = state_of(dtype, 300, 0)
    stored = stored._replace(codes=stored.codes.clone())
    args = (*stored[:2], gradient_of(300), table_for(stored, key=3), 0.9, 1.0, 0.5, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.epi_ds.observe_, args, test_utils=checks)


def test_codes_that_are_not_in_one_piece_are_refused() -> None:
    stored = Stored(torch.zeros(10)[::2], torch.zeros(0), 0)
    with pytest.raises(ValueError, match=r"stride \(2,\)"):
        compiled(*stored[:2], None, table_for(stored), ema_decay=0.9, inverse_scale=1.0, rescale=1.0, step=0)


def run_in(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with an empty cache in ``folder``."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "EPI_DS_CACHE": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


PRINT_BACKEND = (
    "import logging; logging.basicConfig(); from epi_ds.kernels.dispatch import *; print(backend_on('cpu').value)"
)


@pytest.mark.slow
def test_ranks_that_start_at_once_on_a_cold_cache_all_compile(tmp_path: Path) -> None:
    """And one that is killed while it compiles leaves nothing that the next would wait for."""
    command = [sys.executable, "-c", PRINT_BACKEND]
    environment = {**os.environ, "EPI_DS_CACHE": str(tmp_path)}
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob(".build-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        # All four compile by now, or are about to.
        ranks[0].kill()
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert outputs[1:] == ["cpu\n"] * 3
    libraries = [path for path in tmp_path.rglob("libepi_ds.so") if not path.parent.name.startswith(".build-")]
    assert len(libraries) == 1
    before = libraries[0].stat().st_mtime_ns
    assert run_in(tmp_path, PRINT_BACKEND).stdout == "cpu\n"
    assert libraries[0].stat().st_mtime_ns == before


@pytest.mark.slow
def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path: Path) -> None:
    found = run_in(tmp_path, PRINT_BACKEND, CXX="no-such-compiler")
    assert found.stdout == "reference\n"
    assert "no-such-compiler does not start" in found.stderr
    assert "times as long" in found.stderr
    asked = run_in(tmp_path, PRINT_BACKEND, CXX="no-such-compiler", EPI_DS_KERNELS="cpu")
    assert "EPI_DS_KERNELS=cpu cannot be had" in asked.stderr
    unknown = run_in(tmp_path, PRINT_BACKEND, EPI_DS_KERNELS="tpu")
    assert "the kernels are auto, reference, cpu, gpu" in unknown.stderr
    assert run_in(tmp_path, PRINT_BACKEND, EPI_DS_KERNELS="reference").stdout == "reference\n"


def test_a_compiler_that_fails_says_what_it_said(tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho broken compiler >&2\nexit 3\n')
    compiler.chmod(0o755)
    found = run_in(tmp_path / "cache", PRINT_BACKEND, CXX=str(compiler))
    assert found.stdout == "reference\n"
    assert "exit code 3" in found.stderr
    assert "broken compiler" in found.stderr
