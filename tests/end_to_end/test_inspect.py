"""``epi-ds inspect`` on a run of a recipe, against what the run wrote of itself and the model that it exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.end_to_end.recipes import RANKS, TOTAL_STEPS, lines_of
from tests.support.forks import epi_ds
from tests.support.processes import checked

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]


def test_a_run_is_shown(undisturbed: Path, small_base: Path, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    arguments = ["inspect", str(undisturbed), "--base", str(small_base)]
    found = json.loads(checked(epi_ds(*arguments, "--json")).splitlines()[-1])
    facts, refresh = found["facts"], lines_of(undisturbed, "refresh")[-1]
    assert (facts["step"], facts["world_size"], facts["stage"]) == (TOTAL_STEPS, RANKS, "chat")
    assert facts["refreshes"] == len(lines_of(undisturbed, "refresh"))
    assert {layer["name"]: layer["isolated"] for layer in found["layers"]} == refresh["layer_isolated"]
    assert [one["name"] for one in found["remembered"]] == ["reset", "carry"][: facts["finished_stages"]]
    config = AutoConfig.from_pretrained(small_base)
    counts = {one["kind"]: len(one["heads"]) for one in found["projections"]}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    assert counts == {"q": heads, "k": groups, "v": groups, "o": heads}
    for one in found["projections"]:
        cell = next(c for c in found["cells"] if (c["layer"], c["kind"]) == (one["layer"], one["kind"]))
        assert sum(head["isolated"] for head in one["heads"]) == cell["isolated"]
        assert sum(head["entries"] for head in one["heads"]) == cell["entries"]
    before, now = (load_file(folder / "model.safetensors") for folder in (small_base, undisturbed / "export"))
    difference = torch.cat([(now[name].double() - before[name].double()).flatten() for name in before])
    distance = found["whole"]["distance"]
    assert distance["entries"] == len(difference)
    assert distance["rms"] == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-12)
    told = checked(epi_ds(*arguments, "--picture", str(picture)))
    for line in ("policy evolving", "of stage chat", "isolated by head in", "distance from the weights in"):
        assert line in told
    assert picture.read_bytes().startswith(b"\x89PNG")
