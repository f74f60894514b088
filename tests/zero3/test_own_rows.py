"""Rows that a model writes itself: the same at every number of ranks, with gathered weights and in step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import epi_ds
from tests.support.few_words import save_few_words
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

# So many batches that ranks have other numbers of them, or none.
SETTINGS: dict[str, Any] = {
    "rows": 9,
    "batch_size": 4,
    "max_prompt_tokens": 6,
    "max_new_tokens": 6,
    "attempts": 20,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes in no time."""
    return save_few_words(tmp_path_factory.mktemp("words"))


@contextmanager
def partitioned(base: str) -> Iterator[Any]:
    """Yield a model whose weights ZeRO-3 has partitioned as a recipe's are: by transformers, and without an engine."""
    config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    try:
        assert config.is_zero3()
        yield AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    finally:
        unset_hf_deepspeed_config()


def write(base: str, folder: str, weights: list[str]) -> list[str]:
    """Return what stands in the file that each way of holding the weights gave."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    written = []
    for way in weights:
        with partitioned(base) as model:
            random_state, seen = torch.get_rng_state(), []
            file = epi_ds.write_own_rows(
                model, tokenizer, file=f"{folder}/{way}.jsonl", weights=way, show=seen.append, **SETTINGS
            )
            assert torch.equal(torch.get_rng_state(), random_state)
            assert bool(seen) == (dist.get_rank() == 0)
            if way == "gathered":
                assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
            if seen:
                assert seen[-1].rows == SETTINGS["rows"]
                assert "tokens/s" in str(seen[-1])
            written.append(file.read_text())
            counts = json.loads(file.with_suffix(".written.json").read_text())
            written.append(json.dumps({name: counts[name] for name in ("rows", "left_out", "num_tokens")}))
    return written


@pytest.mark.parametrize(
    "ways",
    [
        {1: ["partitioned"], 2: ["gathered", "partitioned"]},
        pytest.param({3: ["partitioned"], 4: ["gathered", "partitioned"]}, marks=pytest.mark.slow),
    ],
    ids=["1 and 2 ranks", "3 and 4 ranks"],
)
def test_a_model_writes_the_same_rows_on_every_number_of_ranks(
    words: Path, tmp_path: Path, ways: dict[int, list[str]]
) -> None:
    """As a model that is whole, in one process without ranks, does."""
    model = AutoModelForCausalLM.from_pretrained(words, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(words)
    alone = epi_ds.write_own_rows(model, tokenizer, file=tmp_path / "alone.jsonl", **SETTINGS)
    rows = [json.loads(line) for line in alone.read_text().splitlines()]
    assert len({json.dumps(row) for row in rows}) == len(rows) == SETTINGS["rows"]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
    counts = json.loads(alone.with_suffix(".written.json").read_text())
    assert counts["left_out"]["empty"] > 0 < counts["left_out"]["cut"]
    for ranks, weights in ways.items():
        folder = tmp_path / str(ranks)
        folder.mkdir()
        for texts in run_ranks(write, ranks, str(words), str(folder), weights):
            for text, said in zip(texts[::2], texts[1::2], strict=True):
                assert text == alone.read_text()
                assert json.loads(said) == {name: counts[name] for name in ("rows", "left_out", "num_tokens")}


def write_with_engine(base: str, folder: str) -> list[str]:
    """A loop of one's own: the engine writes before it trains, and trains as if it had not."""
    texts = []
    for way in ("gathered", "partitioned"):
        losses = []
        for writes in (False, True):
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "zero_optimization": {"stage": 3},
                "epi": {"ratio": 0.1, "refresh_interval": 2},
            }
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(base)
            engine, *_ = epi_ds.initialize(model=model, config=config)
            engine.module.train()
            if writes:
                file = epi_ds.write_own_rows(engine, tokenizer, file=f"{folder}/{way}.jsonl", weights=way, **SETTINGS)
                texts.append(file.read_text())
                assert engine.module.training
            ids = torch.arange(12).view(2, 6) % 7
            for _ in range(2):
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                losses.append(float(loss))
            engine.destroy()
        assert losses[:2] == losses[2:]
    return texts


@pytest.mark.slow
def test_an_engine_writes_before_it_trains(words: Path, tmp_path: Path) -> None:
    for texts in run_ranks(write_with_engine, 2, str(words), str(tmp_path)):
        assert texts[0] == texts[1]
        assert len(texts[0].splitlines()) == SETTINGS["rows"]
