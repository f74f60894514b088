"""The Triton kernels without a GPU: `test_gpu_device.py` once more, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which the GPU kernels are written in, is not installed")

TESTS = Path(__file__).with_name("test_gpu_device.py")


@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_give_the_bits_of_the_reference_when_interpreted(tier: str) -> None:
    """In a process of its own: Triton decides when it is imported, and something may have imported it here."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, str(TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped" not in finished.stdout
