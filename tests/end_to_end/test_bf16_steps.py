"""Steps in bf16 with isolation off and on, and the audit of what was isolated: here on the CPU, `make gpu` on a GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.forks import run_module
from tests.support.processes import checked, run_epi_ds


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("accelerator", "num_ranks"), [("cpu", 2), pytest.param("cuda", 1, marks=pytest.mark.gpu, id="cuda-1")]
)
def test_isolated_weights_stay_in_bf16_and_ratio_zero_is_plain(
    accelerator: str, num_ranks: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if os.environ["DS_ACCELERATOR"] != accelerator:
        pytest.skip(
            f"this session runs on {os.environ['DS_ACCELERATOR']}; make gpu runs on a GPU, make test on the CPU"
        )
    if accelerator == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    checked(run_module("tests.end_to_end.bf16_steps", str(tmp_path), num_ranks=num_ranks))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ratio 0"]["losses"] == result["plain"]["losses"]
    assert result["isolated"]["isolated"] > 0
    # Until the first mask is in force, after step 3, the steps are the same.
    assert result["isolated"]["losses"][:4] == result["plain"]["losses"][:4]
    assert ", moved 0; plastic" in checked(run_epi_ds("audit", str(tmp_path)))
    for name in ("plain", "ratio 0", "isolated"):
        # The first steps compile and allocate.
        milliseconds = 1e3 * min(result[name]["seconds"])
        megabytes = result[name]["bytes"] / 1e6
        record_property("measured", f"{result['device']}, {name}: {milliseconds:.1f} ms a step, {megabytes:.1f} MB")
