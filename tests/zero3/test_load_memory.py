"""A resume needs no copy of the model: what it takes meanwhile is counted in private memory, page by page."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.engines import ds_config, engine_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

# 24 layers of 1.2 million parameters, one of 0.5: 118 MB in fp32.
WIDTHS = [(1100, 1100)] * 24 + [(1100, 450)]
MODEL_BYTES = 4 * sum(rows * columns for rows, columns in WIDTHS)
# Of allocators, threads and modules that are imported meanwhile.
SLACK = 6 << 20


class Wide(nn.Module):
    """Matrices that are too large to hide in an allocator's reserve."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(rows, columns, bias=False) for rows, columns in WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def private_bytes() -> int:
    """Return this process's own memory: pages of mapped files, which the kernel can drop, are not in it."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


@contextmanager
def peak() -> Iterator[list[int]]:
    """Note, every half millisecond, how much more memory this process has than before."""
    # What earlier work freed and the allocator kept would hide what is taken now.
    ctypes.CDLL(None).malloc_trim(0)
    before, most, ended = private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], private_bytes() - before)
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def train(engine: Any) -> None:
    engine.backward(engine(torch.ones(2, 1100)))
    engine.step()


def train_and_save(folder: str, epi: dict[str, Any] | None) -> None:
    with engine_of(Wide, ds_config(epi=epi)) as engine:
        for _ in range(2):
            train(engine)
        engine.save_checkpoint(folder)


def load_and_watch(folder: str, epi: dict[str, Any] | None) -> tuple[int, int]:
    """Return the most that a load took beyond the engine, and the bytes of isolation."""
    with engine_of(Wide, ds_config(epi=epi)) as engine:
        # From here on the optimizer has its moments.
        train(engine)
        with peak() as most:
            engine.load_checkpoint(folder)
        return most[0], engine.epi.memory_report().total_bytes if epi else 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder, epi = str(tmp_path_factory.mktemp("saved")), {"ratio": 0.1, "refresh_interval": 1, "state": "u16"}
    epi["checkpoint"] = {"allow_new_batch_size": True}
    run_ranks(train_and_save, 2, folder, epi)
    return folder, epi


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_another_world_size_copies_no_share(
    saved: tuple[str, dict[str, Any]], world_size: int, record_property: Callable[[str, object], None]
) -> None:
    folder, epi = saved
    found = [most for most, _ in run_ranks(load_and_watch, world_size, folder, epi)]
    line = (
        f"{MODEL_BYTES / 1e6:.0f} MB of weights from 2 ranks to {world_size}: at most {max(found) / 1e6:.0f} MB besides"
    )
    record_property("measured", line)
    for most in found:
        # A parameter at a time, in several forms, of which the allocator keeps some: 10 to 32 MB were seen. One kind of
        # state too many, of a rank's share or of the whole, would exceed this.
        assert most < MODEL_BYTES / max(world_size, 2)


@pytest.mark.slow
def test_the_same_world_size_takes_what_deepspeed_takes(
    saved: tuple[str, dict[str, Any]], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """DeepSpeed's own load reads its whole shard; isolation adds its share, and no more."""
    folder, epi = saved
    run_ranks(train_and_save, 2, str(tmp_path), None)
    plain = max(most for most, _ in run_ranks(load_and_watch, 2, str(tmp_path), None))
    found = run_ranks(load_and_watch, 2, folder, epi)
    line = (
        f"and to 2 again: at most {max(most for most, _ in found) / 1e6:.0f} MB; DeepSpeed alone {plain / 1e6:.0f} MB"
    )
    record_property("measured", line)
    for most, own in found:
        assert most <= plain + own + SLACK
