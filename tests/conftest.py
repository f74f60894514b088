"""Session set-up: the environment that every rank inherits, and the end of the ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before torch or DeepSpeed is imported here or in a rank.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if os.environ["DS_ACCELERATOR"] == "cpu":
    # Otherwise accelerate finds the GPUs and moves batches there, away from DeepSpeed's weights.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["HF_HUB_OFFLINE"] = "1"
# Two releases of ninja do not read each other's logs, so whichever comes second rebuilds every operator: always use
# the environment's own.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# CI ends whoever takes longer than it allows, and then nobody learns what passed: .ci/run says here until which second
# since 1970 a test of the second tier may begin. Those of the first all run.
SLOW_TESTS_BEGIN_UNTIL = float(os.environ.get("SLOW_TESTS_BEGIN_UNTIL", "inf"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > SLOW_TESTS_BEGIN_UNTIL and item.get_closest_marker("slow"):
        pytest.skip("not begun, for SLOW_TESTS_BEGIN_UNTIL had passed on this slow machine; `make test-all` runs it")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured, which pytest would swallow with their output: `record_property("measured", line)`."""
    lines = [
        line
        for report in terminalreporter.getreports("passed")
        for name, line in report.user_properties
        if name == "measured"
    ]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    from tests.support.ranks import end_ranks

    end_ranks()


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with its tokenizer that has learnt next to nothing, for runs whose scores do not matter."""
    from epi_ds.data.skills import SKILLS
    from epi_ds.demo.base_model import pretrain_small_model
    from tests.support.once import made_once

    def make(folder: Path) -> None:
        pretrain_small_model(folder / "model", skills=tuple(SKILLS), steps=10, batch_size=8)

    return made_once(tmp_path_factory, "small_base", make) / "model"
