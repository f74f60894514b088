"""Evaluate tasks on all ranks of a ZeRO-3 engine.

Rows are cut into batches first and the batches are dealt to the ranks afterwards, so a row always shares its batch (and
its padding) with the same rows: scores are equal at every number of ranks, not merely close.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import psutil
import torch
import torch.distributed as dist
from trl.models import unwrap_model_for_generation

from epi_ds.evaluation.tasks import Task
from epi_ds.zero3.local_forwards import local_forwards

logger = logging.getLogger(__name__)

Weights = Literal["auto", "gathered", "partitioned"]

# Gathered weights, and as much again for activations and the cache of generated tokens.
_ROOM_FACTOR = 2.0


class Score(NamedTuple):
    """The result of one task."""

    value: float
    """Share of rows solved, or mean teacher-forced loss per token."""
    num_rows: int
    higher_is_better: bool


class Batch(NamedTuple):
    """Rows of one task that are generated together."""

    task: int
    rows: tuple[int, ...]


def cut_batches(tasks: Sequence[Task], *, batch_size: int) -> list[Batch]:
    """Cut every task's rows into batches, in order."""
    return [
        Batch(index, tuple(range(first, min(first + batch_size, len(task.conversations)))))
        for index, task in enumerate(tasks)
        for first in range(0, len(task.conversations), batch_size)
    ]


class Evaluator:
    """Evaluates tasks with a trainer's engine, model and tokenizer."""

    def __init__(
        self, trainer: Any, tasks: Sequence[Task], *, batch_size: int, max_new_tokens: int, weights: Weights
    ) -> None:
        self._trainer = trainer
        self._tasks = list(tasks)
        self._batches = cut_batches(tasks, batch_size=batch_size)
        self._max_new_tokens = max_new_tokens
        self._weights = weights
        self._announced: bool | None = None

    def evaluate(self) -> dict[str, Score]:
        """Score every task. Collective. Leaves the model in the mode it was in, and every random state alone."""
        if not self._tasks:
            return {}
        gathered = self._gathers()
        model = self._trainer.model
        was_training = model.training
        model.eval()
        results: list[tuple[int, int, float, float]] = []
        with torch.no_grad(), torch.random.fork_rng(), self._model(gathered) as unwrapped:
            for batch, counts in self._own_batches(gathered):
                scored = self._score(unwrapped, batch, synced=not gathered)
                if counts:
                    results += scored
        model.train(was_training)
        return self._merge(results)

    def _gathers(self) -> bool:
        """Decide, alike on all ranks, whether the whole model fits on every one of them now."""
        gathered = self._weights == "gathered"
        if self._weights == "auto":
            needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self._trainer.model.parameters())
            device = self._trainer.accelerator.device
            if device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(device)
            else:
                free = psutil.virtual_memory().available // dist.get_world_size()
            fits = torch.tensor([int(free > _ROOM_FACTOR * needed)], device=device)
            dist.all_reduce(fits, op=dist.ReduceOp.MIN)
            gathered = bool(fits.item())
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

    def _own_batches(self, gathered: bool) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's batches and whether they count.

        With partitioned weights every forward is collective, so ranks with fewer batches repeat one that does not
        count, and a round never mixes generation with teacher forcing, which take different numbers of forwards.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        generated = [batch for batch in self._batches if self._tasks[batch.task].check is not None]
        teacher_forced = [batch for batch in self._batches if self._tasks[batch.task].check is None]
        for batches in (generated, teacher_forced):
            for first in range(0, len(batches), world_size):
                if first + rank < len(batches):
                    yield batches[first + rank], True
                elif not gathered:
                    yield batches[-1], False

    def _score(self, model: Any, batch: Batch, *, synced: bool) -> list[tuple[int, int, float, float]]:
        """Score a batch: (task, row, points, weight) per row."""
        task = self._tasks[batch.task]
        if task.check is None:
            return self._teacher_forced(model, batch, task)
        answers = self._generate(model, [task.conversations[row][:-1] for row in batch.rows], synced=synced)
        return [
            (batch.task, row, float(task.check(row, answer)), 1.0)
            for row, answer in zip(batch.rows, answers, strict=True)
        ]

    def _encode(self, conversations: Sequence[Any], *, side: str, generate: bool) -> Any:
        tokenizer = self._trainer.processing_class
        previous, tokenizer.padding_side = tokenizer.padding_side, side
        try:
            return tokenizer.apply_chat_template(
                [list(messages) for messages in conversations],
                add_generation_prompt=generate,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(self._trainer.accelerator.device)
        finally:
            tokenizer.padding_side = previous

    def _generate(self, model: Any, prompts: Sequence[Any], *, synced: bool) -> list[str]:
        tokenizer = self._trainer.processing_class
        encoded = self._encode(prompts, side="left", generate=True)
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

    def _teacher_forced(self, model: Any, batch: Batch, task: Task) -> list[tuple[int, int, float, float]]:
        """Return the summed negative log-likelihood and the number of tokens of every reference answer."""
        conversations = [task.conversations[row] for row in batch.rows]
        encoded = self._encode(conversations, side="right", generate=False)
        prompts = self._encode([c[:-1] for c in conversations], side="right", generate=True)
        logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        starts = prompts["attention_mask"].sum(dim=1).tolist()
        stops = encoded["attention_mask"].sum(dim=1).tolist()
        scored = []
        # Row by row and answers only: a whole batch of logits in fp32 can be larger than the model.
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            losses = torch.nn.functional.cross_entropy(
                logits[index, start - 1 : stop - 1].float(), encoded["input_ids"][index, start:stop], reduction="none"
            )
            scored.append((batch.task, batch.rows[index], float(losses.double().sum()), float(stop - start)))
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
            scores[task.name] = Score(total / max(weight, 1.0), len(own), task.higher_is_better)
        return scores


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
