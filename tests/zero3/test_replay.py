"""What is computed of a step with replayed rows, at several numbers of ranks, against one process that has all rows."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from epi_ds import ds_configs
from epi_ds.data.skills import load_tokenizer
from epi_ds.demo.base_model import small_llama
from epi_ds.recipe.keep import Keep
from epi_ds.recipe.loading import load_recipe
from epi_ds.recipe.models import Stage
from epi_ds.train.accelerate_setup import prepare_accelerate
from epi_ds.train.kept_rows import KeptRows
from epi_ds.train.resume import DEFAULT_ARGUMENTS
from epi_ds.train.run import run_recipe
from epi_ds.train.trainer import StageTrainer
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

GLOBAL_BATCH = 8
LEARNING_RATE = 1e-2
# Of batches of 8 rows 2, 2 and 3, and in the second stage 2, 3 and 2.
SHARE = 0.3
# A dictionary of every step, from both, and a tolerance for sums in another order.
Step = dict[str, Any]
TOLERANCE = 1e-5


def rows_of(lengths: list[int], learnt: int, *, packed: bool, seed: int) -> Dataset:
    """Rows of arbitrary tokens whose last ones are learnt; packed ones are two such rows in a sequence."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        tokens = torch.randint(5, 90, (length,), generator=generator).tolist()
        row = {"input_ids": tokens, "labels": [-100] * (length - learnt) + tokens[length - learnt :]}
        if packed:
            row = {**{key: 2 * value for key, value in row.items()}, "seq_lengths": [length, length]}
        rows.append(row)
    return Dataset.from_list(rows)


def model() -> Any:
    torch.manual_seed(1)
    return small_llama(len(load_tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2)


def stages_and_rows(packed: bool) -> tuple[list[Stage], list[list[Dataset]], tuple[Dataset, ...]]:
    """Answers of one token in two stages, the first of which has two sources; what is kept has 30 and 3 of them."""
    data = {"skill": "logic", "rows": 1}
    first = [{**data, "source": "small", "share": 1}, {**data, "source": "large", "share": 3}]
    stages = [
        Stage.model_validate({"name": "a", "data": first, "steps": 3}),
        Stage.model_validate({"name": "b", "data": {**data, "source": "late"}, "steps": 3}),
    ]
    short = [
        [rows_of([4, 9, 6], 1, packed=packed, seed=0), rows_of([7] * 10, 1, packed=packed, seed=1)],
        [rows_of([5, 8] * 7, 1, packed=packed, seed=2)],
    ]
    return stages, short, (rows_of([34, 40], 30, packed=packed, seed=3), rows_of([6] * 3, 3, packed=packed, seed=4))


class Record(TrainerCallback):
    """Notes the rows of every step, and what the trainer logs and finds of sources."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[Step] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            found = {"loss": logs["loss"], "norm": logs["grad_norm"], "sources": self.trainer.source_losses.take()}
            self.steps.append(found)


def train(folder: str, micro_batch: int, accumulation: int, replay_loss: str, packed: bool, loss_type: str) -> Any:
    """Train six steps; return what was found in each, and the rows of each: their sources and tokens."""
    stages, rows, kept = stages_and_rows(packed)
    keep = Keep.model_validate(
        {
            "data": [{"skill": "logic", "rows": 1, "source": "long"}, {"skill": "code", "rows": 1, "source": "brief"}],
            "replay": SHARE,
            "replay_stages": True,
            "replay_loss": replay_loss,
            "importance": False,
        }
    )
    record = Record()
    try:
        args = SFTConfig(
            **{
                **DEFAULT_ARGUMENTS,
                "output_dir": folder,
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "num_train_epochs": 1,
                "save_strategy": "no",
                "train_sampling_strategy": "sequential",
                "loss_type": loss_type,
                "packing": packed,
                "deepspeed": ds_configs.load("cpu"),
                **prepare_accelerate(),
            }
        )
        trainer = StageTrainer(
            stages=stages,
            stage_data=rows,
            probe_steps=None,
            probe_data=None,
            marker={},
            kept=KeptRows(keep, keep.sources, kept),
            args=args,
            model=model(),
            processing_class=load_tokenizer(),
            callbacks=[record],
        )
        record.trainer = trainer
        trainer.train()
    finally:
        # The next call in these ranks makes engines of its own.
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
    planned = trainer.train_dataset
    order = [(planned.sources[row["source"]], row) for row in (planned[index] for index in range(len(planned)))]
    return record.steps, [order[first : first + GLOBAL_BATCH] for first in range(0, len(order), GLOBAL_BATCH)]


def oracle(batches: list[Any], *, replay_loss: str, loss_type: str) -> list[Step]:
    """Train on whole global batches in one process, one row after the other, by torch's own parts alone."""
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = []
    for batch in batches:
        losses: dict[str, list[torch.Tensor]] = {}
        for source, row in batch:
            first = 0
            for length in row.get("seq_lengths", [len(row["input_ids"])]):
                ids, labels = (torch.tensor(row[key][first : first + length]) for key in ("input_ids", "labels"))
                logits = trained(input_ids=ids[None]).logits[0, :-1]
                found = cross_entropy(logits, labels[1:], ignore_index=-100, reduction="none")[labels[1:] != -100]
                losses.setdefault(source, []).append(found * (-found).exp().detach() if loss_type == "dft" else found)
                first += length
        tokens = {source: torch.cat(found) for source, found in losses.items()}
        loss = torch.cat(list(tokens.values())).mean()
        if replay_loss == "share":
            replayed = [name for name in tokens if name.endswith("(replayed)")]
            rows = Counter(source for source, _ in batch)
            new = torch.cat([found for name, found in tokens.items() if name not in replayed])
            loss = sum(rows[name] for name in tokens if name not in replayed) * new.mean()
            # Every replayed source has a mean of its own: short answers of one are not drowned by another's long ones.
            loss = (loss + sum(rows[name] * tokens[name].mean() for name in replayed)) / len(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        means = {name: found.mean().item() for name, found in tokens.items()}
        steps.append({"loss": loss.item(), "norm": norm.item(), "sources": means})
    return steps


def check(folder: Path, world_size: int, accumulation: int, **settings: Any) -> None:
    values = {"replay_loss": "share", "packed": False, "loss_type": "nll", **settings}
    micro_batch = GLOBAL_BATCH // (world_size * accumulation)
    ranks = run_ranks(train, world_size, str(folder), micro_batch, accumulation, *values.values())
    steps, batches = ranks[0]
    assert all(found == ranks[0] for found in ranks)
    replayed = [sum(source.endswith("(replayed)") for source, _ in batch) for batch in batches]
    assert replayed == [2, 2, 3, 2, 3, 2]
    del values["packed"]
    expected = oracle(batches, **values)
    for found, wanted in zip(steps, expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE)
        assert found["norm"] == pytest.approx(wanted["norm"], rel=TOLERANCE)
        assert found["sources"] == pytest.approx(wanted["sources"], rel=TOLERANCE)
    # A finished stage's rows have both parts: their own in the first stage, that of replayed ones in the second.
    assert {"small", "large", "long (replayed)"} <= {name for step in steps[:3] for name in step["sources"]}
    assert "large (replayed)" in {name for step in steps[3:] for name in step["sources"]}


def test_the_loss_has_the_share_of_the_replayed_rows(tmp_path: Path) -> None:
    check(tmp_path, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "accumulation", "settings"),
    [
        (1, 4, {"loss_type": "dft"}),
        (4, 1, {}),
        (2, 1, {"packed": True}),
        (2, 2, {"replay_loss": "token"}),
    ],
    ids=["one rank, dft", "four ranks", "packed", "token"],
)
def test_it_does_so_at_any_number_of_ranks_and_with_every_loss(
    tmp_path: Path, world_size: int, accumulation: int, settings: dict[str, Any]
) -> None:
    check(tmp_path, world_size, accumulation, **settings)


def run(recipe: str, *overrides: str) -> None:
    try:
        run_recipe(load_recipe(recipe, overrides))
    finally:
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_a_resume_goes_on_in_what_is_replayed(small_base: Path, tmp_path: Path) -> None:
    recipe = {
        "model": {"path": str(small_base), "dtype": "float32"},
        "stages": [
            {"name": "sums", "data": {"skill": "arithmetic", "rows": 20}},
            {"name": "code", "data": {"skill": "code", "rows": 20}},
        ],
        "method": {
            "epi": {"policy": "none"},
            "keep": {
                "data": {"skill": "logic", "rows": 5, "source": "old"},
                "replay": SHARE,
                "replay_stages": True,
                "importance": False,
            },
        },
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_length": 128,
            "save_steps": 1,
            "deepspeed": "cpu",
        },
        "evaluation": {"rows": 2, "max_new_tokens": 2},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run_ranks(run, 2, str(path))
    steps = steps_of(tmp_path / "run")
    # 20 rows fill three batches of 8 of which 2, 2 and 3 are replayed, and as many of which 2, 3 and 2 are.
    assert [(line["step"], line["stage"]) for line in steps] == [(n, "sums" if n < 4 else "code") for n in range(1, 7)]
    assert set(steps[0]["source_losses"]) == {"arithmetic", "old (replayed)"}
    assert set(steps[4]["source_losses"]) == {"code", "old (replayed)", "arithmetic (replayed)"}
    for number in (5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{number}")
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "first.jsonl")
    for world_size, overrides in ((2, ()), (1, ("train.gradient_accumulation_steps=4",))):
        # In the middle of the second stage.
        again = tmp_path / f"again_{world_size}"
        shutil.copytree(tmp_path / "run", again)
        run_ranks(run, world_size, str(path), f"output={again}", *overrides)
        resumed = steps_of(again)
        assert [line["step"] for line in resumed] == [5, 6]
        for found, expected in zip(resumed, steps[4:], strict=True):
            if world_size == 2:
                assert {**found, "seconds": 0} == {**expected, "seconds": 0}
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert found["source_losses"] == pytest.approx(expected["source_losses"], rel=1e-4)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "step"]
