"""Evaluate tasks on all ranks of a ZeRO-3 engine.

Rows are cut into batches first and the batches are dealt to the ranks afterwards, so a row always shares its batch (and
its padding) with the same rows: scores are equal at every number of ranks, not merely close.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from trl.models import unwrap_model_for_generation

from epi_ds.data.conversation import Conversation
from epi_ds.data.rendering import Encoded, Learnt, Renderer
from epi_ds.errors import UserError
from epi_ds.evaluation.harness.held import HeldModel
from epi_ds.evaluation.room import Weights, fits_gathered, most_scored_tokens
from epi_ds.evaluation.scores import Score, Scored
from epi_ds.evaluation.tasks import Task
from epi_ds.evaluation.turns import turns_of
from epi_ds.zero3.local_forwards import local_forwards

if TYPE_CHECKING:
    # Imports lm-evaluation-harness, which takes a second and an extra.
    from epi_ds.evaluation.harness.harness import Harness

logger = logging.getLogger(__name__)


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


class Evaluator:
    """Evaluates tasks with a trainer's engine, model and tokenizer."""

    def __init__(
        self,
        trainer: Any,
        tasks: Sequence[Task],
        *,
        batch_size: int,
        max_new_tokens: int,
        weights: Weights,
        harness: Harness | None = None,
    ) -> None:
        """``harness`` holds tasks of lm-evaluation-harness, which are scored behind all others.

        Raises UserError for a task with a row that the chat template refuses.
        """
        self._trainer = trainer
        self._tasks = list(tasks)
        self._harness = harness
        self._renderer = Renderer(trainer.processing_class, learnt=Learnt.LAST_TURN)
        self._answers = {index: self._encoded(task) for index, task in enumerate(tasks) if task.check is None}
        self._batch_size = batch_size
        self._batch_tokens = most_scored_tokens(trainer.model.config)
        self._batches = cut_batches(tasks, self._answers, batch_size=batch_size, batch_tokens=self._batch_tokens)
        self._max_new_tokens = max_new_tokens
        self._weights = weights
        self._announced: bool | None = None

    def evaluate(self, show: Callable[[Scored], None] | None = None) -> dict[str, Score]:
        """Score every task. Collective. Leaves the model in the mode it was in, and every random state alone.

        show  is called before each of this rank's batches
        """
        if not self._tasks and self._harness is None:
            return {}
        show = show or (lambda _: None)
        started = time.perf_counter()
        gathered = self._gathers()
        model = self._trainer.model
        was_training = model.training
        model.eval()
        results: list[tuple[int, int, float, float]] = []
        with torch.no_grad(), torch.random.fork_rng(), self._model(gathered) as unwrapped:
            for turn in self._own_turns(gathered):
                task = self._tasks[turn.batch.task]
                show(Scored(task.name, turn.done, len(task.conversations), time.perf_counter() - started))
                scored = self._score(unwrapped, turn.batch, synced=not gathered)
                if turn.counts:
                    results += scored
            scores = self._merge(results)
            if self._harness is not None:
                scores |= self._harness.score(self._held(unwrapped, gathered=gathered, show=show))
        model.train(was_training)
        return scores

    def _held(self, model: Any, *, gathered: bool, show: Callable[[Scored], None]) -> HeldModel:
        return HeldModel(
            model,
            self._trainer.processing_class,
            self._trainer.accelerator.device,
            gathered=gathered,
            batch_size=self._batch_size,
            batch_tokens=self._batch_tokens,
            show=show,
        )

    def _gathers(self) -> bool:
        """Decide, alike on all ranks, whether the whole model fits on every one of them now."""
        gathered = fits_gathered(self._trainer.model, self._trainer.accelerator.device, weights=self._weights)
        if gathered is not self._announced and dist.get_rank() == 0:
            logger.info(
                "evaluation %s",
                "gathers the weights once" if gathered else "keeps weights partitioned and generates in step",
            )
        self._announced = gathered
        return gathered

    @contextmanager
    def _model(self, gathered: bool) -> Iterator[Any]:
        """Yield the model to generate with, without the forward that TRL patched in for training."""
        trainer = self._trainer
        checkpointing = trainer.model.is_gradient_checkpointing
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=gathered
            ) as unwrapped,
            # Ranks have different numbers of batches, or none.
            local_forwards(trainer.model_wrapped) if gathered else nullcontext(),
        ):
            yield unwrapped
        if checkpointing:
            # TRL turns it off while generating, and on again with the defaults instead of the user's settings.
            trainer.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
            )

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

    def _score(self, model: Any, batch: TaskBatch, *, synced: bool) -> list[tuple[int, int, float, float]]:
        """Score a batch: (task, row, points, weight) per row."""
        task = self._tasks[batch.task]
        if task.check is None:
            return self._teacher_forced(model, batch)
        answers = self._generate(model, [task.conversations[row] for row in batch.rows], synced=synced)
        return [
            (batch.task, row, float(task.check(row, answer)), 1.0)
            for row, answer in zip(batch.rows, answers, strict=True)
        ]

    def _encoded(self, task: Task) -> list[Encoded]:
        """Return the tokens of a task that is scored by its loss, cut as training rows are."""
        longest, keeps_end = self._trainer.args.max_length, self._trainer.args.truncation_mode == "keep_end"
        kept = slice(None) if longest is None else slice(-longest, None) if keeps_end else slice(longest)
        found = []
        for number, row in enumerate(task.conversations, 1):
            try:
                whole = self._renderer.encode(row)
            except UserError as error:
                raise UserError(f"evaluation of {task.name}, conversation {number}: {error}") from error
            found.append(Encoded(whole.input_ids[kept], whole.learnt[kept]))
        if lost := sum(not any(row.learnt) for row in found):
            told = f"evaluation of {task.name}: the answers of {lost} of {len(found)} rows lie beyond train.max_length"
            if lost == len(found):
                raise UserError(f"{told} ({longest} tokens), so there is nothing to score; set it higher")
            if dist.get_rank() == 0:
                logger.warning("%s (%s tokens) and are not scored", told, longest)
        return found

    def _padded(self, rows: Sequence[Sequence[int]], *, side: str) -> Any:
        return self._trainer.processing_class.pad(
            {"input_ids": [list(row) for row in rows]}, padding_side=side, return_tensors="pt"
        ).to(self._trainer.accelerator.device)

    def _generate(self, model: Any, rows: Sequence[Conversation], *, synced: bool) -> list[str]:
        tokenizer = self._trainer.processing_class
        encoded = self._padded([self._renderer.ids(row.prompt, row, prompt=True) for row in rows], side="left")
        stops = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)}
        generated = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(stop for stop in stops if stop is not None),
            synced_gpus=synced,
        )
        answers = generated[:, encoded["input_ids"].shape[1] :]
        decoded: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return decoded

    def _teacher_forced(self, model: Any, batch: TaskBatch) -> list[tuple[int, int, float, float]]:
        """Return the summed negative log-likelihood and the number of tokens of every reference answer."""
        rows = [self._answers[batch.task][row] for row in batch.rows]
        encoded = self._padded([row.input_ids for row in rows], side="right")
        logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        scored = []
        # Row by row and answers only: a whole batch of logits in fp32 can be larger than the model.
        for index, row in enumerate(rows):
            # A token is predicted by the one before it, which the first has not.
            learnt = torch.tensor(row.learnt[1:], dtype=torch.bool, device=logits.device).nonzero().flatten()
            losses = torch.nn.functional.cross_entropy(
                logits[index, learnt].float(), encoded["input_ids"][index, learnt + 1], reduction="none"
            )
            scored.append((batch.task, batch.rows[index], float(losses.double().sum()), float(learnt.numel())))
        return scored

    def _merge(self, results: list[tuple[int, int, float, float]]) -> dict[str, Score]:
        gathered: list[list[tuple[int, int, float, float]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, results)
        # In row order whatever the number of ranks: a sum of floats depends on its order.
        rows = sorted(row for part in gathered for row in part)
        scores = {}
        for index, task in enumerate(self._tasks):
            own = [row for row in rows if row[0] == index]
            total, weight = sum(row[2] for row in own), sum(row[3] for row in own)
            solved = None if task.check is None else "".join(str(int(row[2])) for row in own)
            scores[task.name] = Score(total / max(weight, 1.0), len(own), task.higher_is_better, solved=solved)
        return scores


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
