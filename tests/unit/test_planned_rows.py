"""Rows in the order of a run know their source, and so does every label of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from epi_ds.train.planned_rows import SOURCE, SOURCES, Part, PlannedRows, SourceCollator
from epi_ds.train.token_losses import ObservedModel


def rows_of(*lengths: int, first: int = 0) -> Dataset:
    rows = [list(range(first + length, first + 2 * length)) for length in lengths]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


# Two parts of one name are one source; the same rows are another one where they are replayed.
PARTS = [
    Part("a", rows_of(2, 3)),
    Part("b", rows_of(4, first=100)),
    Part("a", rows_of(5, first=200)),
    Part("a", rows_of(2, 3), is_replayed=True),
]


def test_rows_come_in_the_order_of_the_plan_with_their_source() -> None:
    rows = PlannedRows(PARTS, [3, 0, 5, 2, 4, 1])
    assert rows.sources == ("a", "b", "a (replayed)")
    assert rows.is_replayed == (False, False, True)
    found = rows.__getitems__(list(range(len(rows))))
    assert [(len(row["input_ids"]), row[SOURCE]) for row in found] == [(5, 0), (2, 0), (3, 2), (4, 1), (2, 2), (3, 0)]
    assert [rows[position] for position in range(6)] == found
    # Also where a part is a selection of its rows, as what is held out leaves it.
    chosen = PlannedRows([PARTS[0]._replace(rows=PARTS[0].rows.select([1, 0])), PARTS[1]], [0, 2])
    assert [row["input_ids"] for row in chosen.__getitems__([0, 1])] == [[3, 4, 5], [104, 105, 106, 107]]


@pytest.mark.parametrize(("padding_free", "multiple"), [(False, None), (False, 4), (True, None), (True, 8)])
def test_every_label_of_a_batch_knows_its_source(padding_free: bool, multiple: int | None) -> None:
    plain = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=multiple)
    rows = PlannedRows(PARTS, [2, 0, 4]).__getitems__([0, 1, 2])
    batch = SourceCollator(plain)(rows)
    sources = batch.pop(SOURCES)
    expected = plain(rows)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value) if isinstance(value, Tensor) else batch[name] == value
    assert sources.shape == batch["labels"].shape
    if padding_free:
        assert sources[0, :8].tolist() == [1] * 4 + [0] * 2 + [2] * 2
    else:
        assert [row.unique().tolist() for row in sources] == [[1], [0], [2]]
    # A single row, which is one line in either way; and rows of another kind, as a probe reads them.
    assert SourceCollator(plain)(rows[:1])[SOURCES].unique().tolist() == [1]
    assert SOURCES not in SourceCollator(plain)([{"input_ids": [1, 2], "labels": [1, 2]}])


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_weights_multiply_the_gradient_of_every_token_and_leave_its_loss(loss_type: str) -> None:
    log_probs = torch.tensor([[-0.5, -2.0, 0.0], [-1.0, -3.0, -0.1]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.25, 7.0], [3.0, 1.0, 0.5]])

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(log_probs=log_probs * 1, label_mask=log_probs < 0)

    def loss_of(values: Tensor) -> Tensor:
        return -values * values.exp().detach() if loss_type == "dft" else -values

    observed = ObservedModel(model, weights)
    values = observed(fused_lm_head=True, labels=None).log_probs
    assert torch.equal(observed.losses(loss_type), loss_of(values))
    assert torch.equal(observed.is_learnt, log_probs < 0)
    loss_of(values).sum().backward()
    assert log_probs.grad is not None
    gradient, log_probs.grad = log_probs.grad, None
    (loss_of(log_probs) * weights).sum().backward()
    torch.testing.assert_close(gradient, log_probs.grad, rtol=1e-6, atol=0)


def test_a_loss_that_was_not_computed_from_tokens_is_no_loss_of_tokens() -> None:
    observed = ObservedModel(lambda **inputs: SimpleNamespace(logits=None), None)
    assert observed(input_ids=None).logits is None
    with pytest.raises(RuntimeError, match="without its model's log-probabilities"):
        observed.losses("nll")
    with pytest.raises(RuntimeError, match="without its model's log-probabilities"):
        _ = observed.is_learnt
