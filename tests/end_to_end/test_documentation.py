"""README's whole script, as it stands there, under every launcher that README names."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from epi_ds.data.skills import Split, rows
from epi_ds.launch.local import free_port
from tests.support.processes import checked, run_command

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
INTERVAL = '"refresh_interval": 100'


def script() -> str:
    (found,) = re.findall(r"^```python\n(# finetune\.py\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return found


def launchers(port: int) -> dict[str, list[str]]:
    """README's commands for 2 ranks of this machine. Without GPUs the deepspeed command has to be told how many."""
    return {
        "deepspeed": ["--num_accelerators", "2", "--master_port", str(port)],
        "torchrun": ["--nproc-per-node", "2", "--master-port", str(port)],
        "accelerate": ["launch", "--use_deepspeed", "--num_processes", "2", "--main_process_port", str(port)],
    }


@pytest.mark.slow
def test_the_script_of_readme_trains_alike_under_every_launcher(small_base: Path, tmp_path: Path) -> None:
    text = script()
    # A model that is here, and a mask within the few steps of its data.
    assert text.count(MODEL) == text.count(INTERVAL) == 1
    text = text.replace(MODEL, repr(str(small_base))).replace(INTERVAL, '"refresh_interval": 2')
    data = [{"messages": list(row.messages)} for row in rows("code", split=Split.TRAIN, size=32, seed=0)]
    weights = {}
    for name in launchers(0):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "finetune.py").write_text(text)
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in data))
        command = [str(BIN / name), *launchers(free_port())[name], "finetune.py"]
        checked(run_command(command, cwd=folder, timeout=300))
        weights[name] = load_file(folder / "out" / "final" / "model.safetensors")
        # Isolation was attached, and the run can be gone on with.
        assert list((folder / "out").glob("checkpoint-*/epi/manifest.json"))
    first = weights["torchrun"]
    for name, found in weights.items():
        assert found.keys() == first.keys()
        # One run three times: the same rows in the same order, the same losses, the same bits.
        assert all(found[key].equal(first[key]) for key in first), name
    assert any(not value.equal(load_file(small_base / "model.safetensors")[key]) for key, value in first.items())
