"""``model.lora`` by the installed command: trained, saved, scored and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from epi_ds.checkpoint.catalog import open_checkpoint
from epi_ds.checkpoint.tag import Consent, open_tag
from epi_ds.errors import UserError
from epi_ds.inspect.export import export_tag
from tests.end_to_end.recipes import RANKS, lines_of, write_recipe
from tests.support.forks import epi_ds
from tests.support.processes import checked


@pytest.mark.slow
def test_an_adapter_is_trained_and_merged_at_the_end(small_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        small_base,
        model={"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
        stages=[{"name": "a", "data": {"skill": "arithmetic", "rows": 24}, "learning_rate": 1e-2}],
        method={"epi": {"policy": "first", "ratio": 0.1, "refresh_interval": 1, "memory": "none"}},
        evaluation={"skills": [], "rows": 4, "max_new_tokens": 4},
    )
    assert "isolation protects only the" in checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    run = tmp_path / "run"
    steps = lines_of(run, "step")
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["isolated"] > 0 for line in steps] == [False, True, True]
    before = AutoModelForCausalLM.from_pretrained(small_base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "export").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys()
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}
    checkpoint = next((run / "checkpoints").glob("checkpoint-*"))
    with pytest.raises(UserError, match="is of a model with an adapter"):
        export_tag(open_tag(open_checkpoint(checkpoint), consent=Consent(True, "")), tmp_path / "out", model=small_base)
