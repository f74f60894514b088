"""A part of ``make faults``: of every kind some."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.zero3


@pytest.mark.slow
def test_no_fault_goes_by_in_silence(record_property: Callable[[str, str], None]) -> None:
    """In a process of its own, from which ranks are forked."""
    command = [sys.executable, "-m", "tests.faults", "--quick"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    last = finished.stdout.splitlines()[-1]
    record_property("measured", last)
    counts = re.fullmatch(
        r"faults (\d+), survived (\d+), refused clearly (\d+), silent restarts 0, hangs 0, wrong states 0", last
    )
    assert counts is not None, last
    faults, survived, refused = (int(count) for count in counts.groups())
    assert faults == survived + refused
    assert faults >= 20
