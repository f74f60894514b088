"""Score tasks of our own by a model that is held, with whole weights or with those that ZeRO-3 fetches.

Rows are cut into batches first and the batches are dealt to the ranks afterwards, so a row always shares its batch (and
its padding) with the same rows: scores are equal at every number of ranks, not merely close.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from epi_ds.data.conversation import Conversation
from epi_ds.data.rendering import Encoded, Learnt, Renderer
from epi_ds.errors import UserError
from epi_ds.evaluation.held import HeldModel
from epi_ds.evaluation.scores import Score, Scored
from epi_ds.evaluation.tasks import Task
from epi_ds.evaluation.turns import turns_of

logger = logging.getLogger(__name__)


class _RowScore(NamedTuple):
    """What one row is worth."""

    task: int
    row: int
    points: float
    """1 where it is solved and 0 where not; of a task that is scored by its loss the sum over its tokens."""
    weight: float
    """How many rows, or tokens, that is of."""


class TaskBatch(NamedTuple):
    """Rows of one task that are generated together."""

    task: int
    rows: tuple[int, ...]


class _Turn(NamedTuple):
    """A batch that this rank scores."""

    batch: TaskBatch
    counts: bool
    """Whether its scores are taken."""
    done: int
    """Rows of its task that come in earlier turns, of all ranks."""


def cut_batches(
    tasks: Sequence[Task], answers: Mapping[int, Sequence[Encoded]], *, batch_size: int, batch_tokens: int
) -> list[TaskBatch]:
    """Cut every task's rows into batches, in order, the same on all ranks.

    answers       the tokens of the rows of tasks that are scored by their loss, by task
    batch_tokens  the most tokens of such a batch, padding included: their logits are the largest tensor of all
    """
    batches = []
    for index, task in enumerate(tasks):
        rows: list[int] = []
        longest = 0
        for row in range(len(task.conversations)):
            length = len(answers[index][row].input_ids) if index in answers else 0
            if len(rows) == batch_size or (rows and max(longest, length) * (len(rows) + 1) > batch_tokens):
                batches.append(TaskBatch(index, tuple(rows)))
                rows, longest = [], 0
            rows.append(row)
            longest = max(longest, length)
        if rows:
            batches.append(TaskBatch(index, tuple(rows)))
    return batches


class TaskScorer:
    """Tasks of our own, their rows encoded, to be scored as often as is wanted."""

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Any,
        *,
        batch_size: int,
        batch_tokens: int,
        max_new_tokens: int,
        max_length: int | None,
        truncation_mode: str,
    ) -> None:
        """Encode the rows of all tasks.

        batch_size                   most rows of a batch
        batch_tokens                 most tokens of one that is scored by its loss, padding included
        max_new_tokens               longest answer that is generated
        max_length, truncation_mode  what rows that are scored by their loss are cut to, as training rows are

        Raises UserError for a task with a row that the chat template refuses, and for one of which nothing is left.
        """
        self._tasks = list(tasks)
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, learnt=Learnt.LAST_TURN)
        keeps_end = truncation_mode == "keep_end"
        self._max_length = max_length
        self._kept = slice(None) if max_length is None else slice(-max_length, None) if keeps_end else slice(max_length)
        self._answers = {index: self._encoded(task) for index, task in enumerate(tasks) if task.check is None}
        self._batches = cut_batches(tasks, self._answers, batch_size=batch_size, batch_tokens=batch_tokens)
        self._max_new_tokens = max_new_tokens

    def score(self, held: HeldModel) -> dict[str, Score]:
        """Return the scores of all tasks by their names. Collective where there are several ranks.

        The model is in evaluation mode, and nothing asks for gradients.
        """
        started = time.perf_counter()
        results: list[_RowScore] = []
        for turn in self._own_turns(held.gathered):
            task = self._tasks[turn.batch.task]
            held.show(Scored(task.name, turn.done, len(task.conversations), time.perf_counter() - started))
            scored = self._scored(held, turn.batch)
            if turn.counts:
                results += scored
        return self._merged(results)

    def _own_turns(self, gathered: bool) -> Iterator[_Turn]:
        """Yield this rank's batches.

        With partitioned weights a round never mixes generation with teacher forcing, which take different numbers of
        forwards.
        """
        generated = [batch for batch in self._batches if self._tasks[batch.task].check is not None]
        teacher_forced = [batch for batch in self._batches if self._tasks[batch.task].check is None]
        for batches in (generated, teacher_forced):
            for turn in turns_of(len(batches), gathered=gathered):
                batch = batches[turn.batch]
                done = sum(len(one.rows) for one in batches[: turn.first] if one.task == batch.task)
                yield _Turn(batch, turn.counts, done)

    def _scored(self, held: HeldModel, batch: TaskBatch) -> list[_RowScore]:
        task = self._tasks[batch.task]
        if task.check is None:
            return self._teacher_forced(held, batch)
        answers = self._generate(held, [task.conversations[row] for row in batch.rows])
        return [
            _RowScore(batch.task, row, float(task.check(row, answer)), 1.0)
            for row, answer in zip(batch.rows, answers, strict=True)
        ]

    def _encoded(self, task: Task) -> list[Encoded]:
        """Return the tokens of a task that is scored by its loss, cut as training rows are."""
        found = []
        for number, row in enumerate(task.conversations, 1):
            try:
                whole = self._renderer.encode(row)
            except UserError as error:
                raise UserError(f"evaluation of {task.name}, conversation {number}: {error}") from error
            found.append(Encoded(whole.input_ids[self._kept], whole.learnt[self._kept]))
        if lost := sum(not any(row.learnt) for row in found):
            told = f"evaluation of {task.name}: the answers of {lost} of {len(found)} rows lie beyond train.max_length"
            if lost == len(found):
                raise UserError(f"{told} ({self._max_length} tokens), so there is nothing to score; set it higher")
            # All ranks read the same rows.
            if os.environ.get("RANK", "0") == "0":
                logger.warning("%s (%s tokens) and are not scored", told, self._max_length)
        return found

    def _padded(self, rows: Sequence[Sequence[int]], *, side: str, device: torch.device) -> Any:
        return self._tokenizer.pad(
            {"input_ids": [list(row) for row in rows]}, padding_side=side, return_tensors="pt"
        ).to(device)

    def _generate(self, held: HeldModel, rows: Sequence[Conversation]) -> list[str]:
        tokenizer, model = self._tokenizer, held.model
        prompts = [self._renderer.ids(row.prompt, row, prompt=True) for row in rows]
        encoded = self._padded(prompts, side="left", device=held.device)
        stops = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)}
        generated = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(stop for stop in stops if stop is not None),
            synced_gpus=not held.gathered,
        )
        answers = generated[:, encoded["input_ids"].shape[1] :]
        decoded: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return decoded

    def _teacher_forced(self, held: HeldModel, batch: TaskBatch) -> list[_RowScore]:
        """Return the summed negative log-likelihood and the number of tokens of every reference answer."""
        rows = [self._answers[batch.task][row] for row in batch.rows]
        encoded = self._padded([row.input_ids for row in rows], side="right", device=held.device)
        logits = held.model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        scored = []
        # Row by row and answers only: a whole batch of logits in fp32 can be larger than the model.
        for index, row in enumerate(rows):
            # A token is predicted by the one before it, which the first has not.
            learnt = torch.tensor(row.learnt[1:], dtype=torch.bool, device=logits.device).nonzero().flatten()
            losses = torch.nn.functional.cross_entropy(
                logits[index, learnt].float(), encoded["input_ids"][index, learnt + 1], reduction="none"
            )
            scored.append(_RowScore(batch.task, batch.rows[index], float(losses.double().sum()), float(learnt.numel())))
        return scored

    def _merged(self, results: list[_RowScore]) -> dict[str, Score]:
        gathered = [results]
        # A process without a group is the only one.
        if dist.is_initialized():
            gathered = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, results)
        # In row order whatever the number of ranks: a sum of floats depends on its order.
        rows = sorted(row for part in gathered for row in part)
        scores = {}
        for index, task in enumerate(self._tasks):
            own = [row for row in rows if row.task == index]
            total, weight = sum(row.points for row in own), sum(row.weight for row in own)
            solved = None if task.check is None else "".join(str(int(row.points)) for row in own)
            scores[task.name] = Score(total / max(weight, 1.0), len(own), task.higher_is_better, solved=solved)
        return scores


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
