"""What explains a study's scores: drift of masks, conflict of gradients, and what importance knew of old skills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from epi_ds.data.skills import Split, rows
from epi_ds.demo.base_model import collate, encode
from epi_ds.evaluation.tasks import TEST_SEED
from epi_ds.study.conflict import Ends, conflicts_of
from epi_ds.study.gradients import BATCH_SIZE, GradientMeter, SkillGradients
from epi_ds.study.mask_drift import mask_drift_of
from epi_ds.study.measures import Cosines
from epi_ds.study.sensitivity import LastImportance, last_importance, sensitivities_of
from epi_ds.train.metrics import read_metrics

COMPATIBLE = Path(__file__).parents[1] / "compatibility" / "v0_1_0" / "recipe"
SAVED, BASE = COMPATIBLE / "run", COMPATIBLE / "base"


def gradients(*entries: float, squares: tuple[float, ...] = ()) -> SkillGradients:
    half = len(entries) // 2
    both = torch.tensor(entries), torch.tensor(squares or [entry**2 for entry in entries])
    return SkillGradients(*({"a": values[:half].view(-1, 1), "b": values[half:]} for values in both))


# --- drift of masks ---


def refresh(isolated: int, **changes: Any) -> dict[str, Any]:
    known = {"jaccard": None, "jaccard_first": None, "layer_flip_rate": {"low": None, "high": None}}
    return {"event": "refresh", "isolated": isolated, "achieved_ratio": isolated / 100, **known, **changes}


def test_drift_is_of_masks_that_isolate() -> None:
    assert mask_drift_of([{"event": "run"}, refresh(0)]) is None
    alone = mask_drift_of([refresh(0), refresh(9, jaccard_first=1.0)])
    assert alone is not None
    assert (alone.refreshes, alone.isolated_share, alone.first_last, alone.between_refreshes) == (1, 0.09, None, None)
    assert alone.layer_flip_rate == {}


def test_drift_sums_up_what_refreshes_wrote() -> None:
    found = mask_drift_of(
        [
            refresh(10, jaccard_first=1.0),
            refresh(20, jaccard=0.5, jaccard_first=0.5, layer_flip_rate={"low": 0.0, "high": 0.5}),
            refresh(19, jaccard=0.75, jaccard_first=0.25, layer_flip_rate={"low": 0.1, "high": None}),
        ]
    )
    assert found is not None
    assert (found.refreshes, found.isolated_share, found.first_last, found.between_refreshes) == (3, 0.19, 0.25, 0.625)
    assert found.layer_flip_rate == {"low": pytest.approx(0.05), "high": 0.5}


def test_metrics_of_an_earlier_commit_have_a_drift() -> None:
    found = mask_drift_of(read_metrics(SAVED / "metrics.jsonl"))
    assert found is not None
    assert 0 < (found.first_last or 0) < (found.between_refreshes or 0) < 1
    assert found.isolated_share == pytest.approx(0.1, abs=1e-3)
    assert "model.layers.1" in found.layer_flip_rate


# --- conflict of gradients ---


def test_conflict_is_the_cosine_over_all_parameters() -> None:
    base = {
        "new": gradients(1.0, 0.0, 2.0, 0.0),
        "code": gradients(-2.0, 0.0, -4.0, 0.0),
        "logic": gradients(0, 3, 0, 1),
    }
    trained = {
        "new": gradients(1.0, 1.0, 0.0, 0.0),
        "code": gradients(1.0, 0.0, 0.0, 0.0),
        "logic": gradients(0, 0, 0, 0),
    }
    found = conflicts_of(Ends(base, trained), new="new", kept=("code", "logic"))
    assert (found["code"].base, found["code"].trained) == pytest.approx((-1.0, 0.5**0.5))
    # What is at its optimum is against nothing.
    assert found["logic"] == Cosines(base=0.0, trained=0.0)


# --- sensitivity ---


def importance(*entries: float, isolated: tuple[int, ...]) -> LastImportance:
    values, mask = torch.tensor(entries), torch.zeros(len(entries), dtype=torch.bool)
    mask[list(isolated)] = True
    half = len(entries) // 2
    return LastImportance({"a": values[:half], "b": values[half:]}, {"a": mask[:half], "b": mask[half:]})


def test_sensitivity_is_of_ranks_and_of_the_top() -> None:
    base = {"code": gradients(0, 0, 0, 0, squares=(4.0, 3.0, 2.0, 1.0))}
    # In ranks, not in values.
    same = sensitivities_of(importance(1000.0, 3.0, 2.0, 1.0, isolated=(0, 1)), base)["code"]
    assert (same.rank_correlation, same.held) == (pytest.approx(1.0), 1.0)
    opposite = sensitivities_of(importance(1.0, 2.0, 3.0, 4.0, isolated=(1, 3)), base)["code"]
    assert (opposite.rank_correlation, opposite.held) == (pytest.approx(-1.0), 0.5)
    tied = sensitivities_of(importance(1.0, 1.0, 0.0, 0.0, isolated=()), base)["code"]
    assert (tied.rank_correlation, tied.held) == (pytest.approx(0.8944, abs=1e-4), None)
    even = sensitivities_of(importance(1.0, 1.0, 1.0, 1.0, isolated=(0,)), base)["code"]
    assert even.rank_correlation is None


def test_importance_is_read_from_a_checkpoint_of_two_ranks() -> None:
    found = last_importance(SAVED / "checkpoints", step=6)
    assert found is not None
    (last,) = [
        line for line in read_metrics(SAVED / "metrics.jsonl") if line["event"] == "refresh" and line["step"] == 6
    ]
    assert sum(int(mask.sum()) for mask in found.mask.values()) == last["isolated"]
    assert found.importance.keys() == found.mask.keys()
    assert all(len(values) == len(found.mask[name]) for name, values in found.importance.items())
    # Selection compared the larger of it and of what is remembered of the stage before.
    for layer in last["layer_importance"].values():
        assert 0 < float(found.importance[layer["largest_in"]].max()) <= layer["largest"]
    assert last_importance(SAVED / "checkpoints", step=7) is None


def test_gradients_are_of_answers_by_batch() -> None:
    meter = GradientMeter(BASE)
    found = meter.of("code", batches=2)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model: Any = AutoModelForCausalLM.from_pretrained(str(BASE), dtype=torch.float32)
    drawn = rows("code", split=Split.TEST, size=2 * BATCH_SIZE, seed=TEST_SEED)
    encoded = encode(tokenizer, [row.messages for row in drawn])
    squares = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for batch in (encoded[:BATCH_SIZE], encoded[BATCH_SIZE:]):
        before = {name: 0 if value.grad is None else value.grad.clone() for name, value in model.named_parameters()}
        model(**collate(batch, tokenizer.pad_token_id)).loss.backward()
        for name, value in model.named_parameters():
            squares[name] += (value.grad - before[name]) ** 2
    for name, value in model.named_parameters():
        torch.testing.assert_close(found.mean[name], value.grad / 2)
        torch.testing.assert_close(found.mean_square[name], squares[name] / 2, rtol=1e-3, atol=1e-9)
    # The same rows every time.
    again = meter.of("code", batches=2)
    assert all(torch.equal(again.mean[name], value) for name, value in found.mean.items())
