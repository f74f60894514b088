"""Evaluation on every number of ranks: also where there are fewer batches than ranks, or none of one kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from epi_ds import ds_configs
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.data.conversation import conversation_of
from epi_ds.data.skills import Split, get_skill, rows
from epi_ds.evaluation.evaluator import Evaluator
from epi_ds.evaluation.scores import Score, Scored
from epi_ds.evaluation.tasks import Task
from epi_ds.recipe.harness import HarnessSection
from epi_ds.train.accelerate_setup import prepare_accelerate
from tests.support.harness_tasks import ALL, SAMPLED, write_tasks
from tests.support.ranks import run_ranks
from tests.support.tables import prompts_and_completions

if TYPE_CHECKING:
    from epi_ds.evaluation.harness.harness import Harness

pytestmark = pytest.mark.zero3

BATCH_SIZE = 2
WEIGHTS = ("gathered", "partitioned")
# Rows of a task with answers, and of one with a loss. Batches of two: one, none, as many as 2 ranks, one more than 2.
CASES = {
    "one batch of answers": (2, 0),
    "one batch of losses": (0, 2),
    "one row of each": (1, 1),
    "two batches of answers, one of losses": (4, 2),
    "one of answers, three of losses": (2, 5),
}
# Their scores stand among those of the cases.
HARNESS = "tasks of lm-evaluation-harness"


def tasks_of(answers: int, losses: int) -> list[Task]:
    skill = get_skill("dialogue")
    drawn = rows("dialogue", split=Split.TEST, size=answers + losses, seed=0)
    conversations = [conversation_of(row.messages) for row in drawn]
    tasks = []
    if answers:
        tasks.append(Task("answers", conversations[:answers], lambda index, text: skill.check(drawn[index], text)))
    if losses:
        tasks.append(Task("losses", conversations[answers:], None))
    return tasks


class Evaluate(TrainerCallback):
    """Scores every case before the first step, when ZeRO-3 knows no order of submodules, and after the second."""

    def __init__(self, harness: Harness) -> None:
        self.trainer: Any = None
        self.harness = harness
        self.scores: dict[tuple[str, str, int], dict[str, Score]] = {}
        self.shown: dict[tuple[str, str], list[Scored]] = {}

    def _evaluate(self, step: int) -> None:
        for name, sizes in CASES.items():
            for weights in WEIGHTS:
                evaluator = Evaluator(
                    self.trainer, tasks_of(*sizes), batch_size=BATCH_SIZE, max_new_tokens=4, weights=weights
                )
                self.scores[name, weights, step] = evaluator.evaluate(self.shown.setdefault((name, weights), []).append)
        for weights in WEIGHTS:
            evaluator = Evaluator(
                self.trainer, [], batch_size=BATCH_SIZE, max_new_tokens=4, weights=weights, harness=self.harness
            )
            self.scores[HARNESS, weights, step] = evaluator.evaluate()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self._evaluate(2)


def score(base: str, own_tasks: str, folder: str) -> tuple[dict[tuple[str, str, int], dict[str, Score]], list[float]]:
    """Train three steps; return the scores and the losses."""
    from epi_ds.evaluation.harness.harness import Harness

    # One question with three choices, which make two batches, and one batch of each other kind.
    section = HarnessSection(tasks=(*ALL, SAMPLED), include_path=own_tasks, limit=1)
    evaluate = Evaluate(Harness(section, once=on_first_rank))
    data = [row.messages for row in rows("dialogue", split=Split.TRAIN, size=24, seed=0)]
    try:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=2,
            max_steps=3,
            save_strategy="no",
            logging_steps=1,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            deepspeed=ds_configs.load("cpu"),
            **prepare_accelerate(),
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
            args=args,
            train_dataset=prompts_and_completions(data),
            processing_class=AutoTokenizer.from_pretrained(base),
            callbacks=[evaluate],
        )
        evaluate.trainer = trainer
        trainer.train()
    finally:
        # The next call in these ranks makes engines of its own.
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
    if dist.get_rank() == 0:
        check_shown(evaluate.shown)
    return evaluate.scores, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def check_shown(shown: dict[tuple[str, str], list[Scored]]) -> None:
    """What is seen of an evaluation while it runs: the rows of the turns before, of all ranks."""
    assert shown.keys() == {(name, weights) for name in CASES for weights in WEIGHTS}
    for (name, _), found in shown.items():
        totals = dict(zip(("answers", "losses"), CASES[name], strict=True))
        own = [one.done for one in found if one.task == found[-1].task]
        turns = range(0, totals[found[-1].task], BATCH_SIZE * dist.get_world_size())
        assert own == [*turns] * 2, name
        assert all(one.total == totals[one.task] and one.seconds >= 0 for one in found)


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of tasks for lm-evaluation-harness."""
    return str(write_tasks(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def alone(small_base: Path, own_tasks: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The scores of one rank, which has all batches."""
    return run_ranks(score, 1, str(small_base), own_tasks, str(tmp_path_factory.mktemp("alone")))[0][0]


@pytest.mark.slow
def test_one_rank_scores_every_row_with_either_weights(alone: Any) -> None:
    for name, (answers, losses) in CASES.items():
        for step in (0, 2):
            scores = alone[name, "gathered", step]
            assert scores == alone[name, "partitioned", step]
            assert {task: own.num_rows for task, own in scores.items()} == {
                task: size for task, size in (("answers", answers), ("losses", losses)) if size
            }
            assert all(math.isfinite(own.value) for own in scores.values())
            if answers:
                solved = scores["answers"].solved
                assert solved is not None
                assert len(solved) == answers
                assert solved.count("1") / answers == scores["answers"].value
            assert not losses or scores["losses"].solved is None
    for step in (0, 2):
        scores = alone[HARNESS, "gathered", step]
        assert scores == alone[HARNESS, "partitioned", step]
        assert list(scores) == [f"lm_eval/{name}" for name in (*ALL, SAMPLED)]
        assert scores[f"lm_eval/{SAMPLED}"].value > 0
        assert all(math.isfinite(own.value) and own.num_rows == 1 for own in scores.values())
    # It has learnt.
    assert alone[HARNESS, "gathered", 0] != alone[HARNESS, "gathered", 2]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_fewer_batches_than_ranks_end_with_the_same_scores(
    world_size: int, small_base: Path, own_tasks: str, tmp_path: Path, alone: Any
) -> None:
    found = run_ranks(score, world_size, str(small_base), own_tasks, str(tmp_path), timeout=120)
    scores, losses = found[0]
    assert all(own == found[0] for own in found)
    assert len(losses) == 3
    for (name, weights, step), own in scores.items():
        assert own.keys() == alone[name, weights, step].keys(), (name, weights)
        if step == 0:
            # The weights are the same as on one rank; after training on other batches they are not.
            assert own == alone[name, weights, step], (name, weights)
        assert own == scores[name, "gathered", step]
