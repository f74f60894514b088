"""Write own rows on all ranks: batches are dealt out, and what comes back is sifted in the order of its numbers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch.distributed as dist
from pydantic import ValidationError

from epi_ds.checkpoint.verdict import agree, on_first_rank
from epi_ds.errors import RemedyError, UserError, problems_of, summarize
from epi_ds.evaluation.room import Weights
from epi_ds.own_rows.authors import Author, author_of
from epi_ds.own_rows.file import standing_in, write_rows
from epi_ds.own_rows.model import WritingModel, writing_model
from epi_ds.own_rows.sifting import Draft, Sifter
from epi_ds.recipe.keep import OwnRows

logger = logging.getLogger(__name__)

T = TypeVar("T")


class WritingProgress(NamedTuple):
    """How far a model has come with its rows."""

    rows: int
    wanted: int
    num_tokens: int
    """That were sampled so far, for rows that were left out too."""
    seconds: float
    left_out: str
    """How many rows, and why."""

    def __str__(self) -> str:
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        return f"own rows {self.rows}/{self.wanted}, {rate:,.0f} tokens/s, left out: {self.left_out}"


Show = Callable[[WritingProgress], None]


def write_own_rows(
    model: Any,
    tokenizer: Any,
    *,
    file: str | Path,
    rows: int = 512,
    weights: Weights = "auto",
    show: Show | None = None,
    **settings: Any,
) -> Path:
    """Have a model write rows itself, and return the file that they stand in, as JSON lines.

    Collective where there are several ranks: all call it, before the model is trained. What stands in ``file`` already
    is used as it is, so that a script which is started again has the same rows.

    model     a causal language model of transformers, whole or partitioned by ZeRO-3, or the engine around one
    tokenizer  its tokenizer; with a chat template the rows are conversations, else texts
    file      where the rows are written; every rank must see it
    rows      how many
    weights   ``gathered`` once on every rank, ``partitioned``, or ``auto`` by the free memory
    show      called on the first rank with the progress after every round, by default a line of the log
    settings  those of ``method.keep.self`` in a recipe: temperature, top_p, max_prompt_tokens, max_new_tokens,
              batch_size, seed, attempts, kind

    Raises UserError for settings that there are not, a tokenizer that cannot, and a file that was written with others,
    and RemedyError where no row could be kept.
    """
    return write(model, tokenizer, Path(file), _settings_of({"rows": rows, **settings}), weights=weights, show=show)


def write(
    model: Any, tokenizer: Any, file: Path, settings: OwnRows, *, weights: Weights, show: Show | None = None
) -> Path:
    """Do what `write_own_rows` does, with settings that are known to be right."""
    ranks = _Ranks.now()
    module = model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model
    name = module.config.name_or_path
    if stands_already(file, settings, model=name):
        return file
    stops = module.generation_config.eos_token_id
    author = author_of(tokenizer, settings, stops=stops if isinstance(stops, list) else [stops])
    started = time.perf_counter()
    sifter = Sifter(settings.rows)
    with writing_model(model, weights=weights) as writer:
        for progress in _rounds(sifter, author, writer, settings, ranks):
            if ranks.rank == 0:
                (show or _log)(progress)
    seconds = time.perf_counter() - started
    if ranks.rank == 0:
        _tell_of_fewer(sifter, settings)
    found = {
        "rows": len(sifter.rows),
        "left_out": dict(sifter.left_out),
        "num_tokens": sifter.num_tokens,
        "seconds": seconds,
    }
    ranks.on_first(lambda: write_rows(file, sifter.rows, settings=_said(settings, name), found=found))
    return file


def stands_already(file: Path, settings: OwnRows, *, model: str) -> bool:
    """Whether rows stand in a file that are to be used as they are, which is told. Collective.

    model  the name of the one that would write them, a folder or an id

    Raises UserError for rows that were written with other settings, see `standing_in`.
    """
    ranks = _Ranks.now()
    standing = ranks.on_first(lambda: standing_in(file, _said(settings, model)))
    if standing is not None and ranks.rank == 0:
        if standing.is_edited:
            logger.warning(
                "%s holds %d rows that were given, or edited since they were written: they are used as they are, and "
                "the settings of own rows are not",
                file,
                standing.num_rows,
            )
        else:
            logger.info("own rows: %d rows stand in %s, and are used", standing.num_rows, file)
    return standing is not None


def _said(settings: OwnRows, model: str) -> dict[str, Any]:
    """Return what rows are written with, as JSON has it."""
    return {"model": model, **settings.model_dump(mode="json", exclude={"file"})}


def _settings_of(values: dict[str, Any]) -> OwnRows:
    if "file" in values:
        raise UserError("file is given once, and own rows are written there")
    try:
        return OwnRows.model_validate(values)
    except ValidationError as error:
        raise UserError(summarize(problems_of(error, OwnRows), place="write_own_rows(...)")) from None


class _Ranks(NamedTuple):
    """Those that write together: all of a process group, or this process alone where there is none."""

    rank: int
    world_size: int

    @classmethod
    def now(cls) -> _Ranks:
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls(0, 1)

    def on_first(self, action: Callable[[], T]) -> T:
        return on_first_rank(action) if self.world_size > 1 else action()

    def gathered(self, action: Callable[[], T]) -> list[T]:
        """Return what the action gave on every rank, in their order; where it fails on one, raise on all."""
        if self.world_size == 1:
            return [action()]
        own = agree(action)
        found = [own] * self.world_size
        dist.all_gather_object(found, own)
        return found


def _rounds(
    sifter: Sifter, author: Author, writer: WritingModel, settings: OwnRows, ranks: _Ranks
) -> Iterator[WritingProgress]:
    """Have batches written, one by every rank at a time, until there are enough rows or no attempt is left.

    Batches that were written beside the last one that was needed are thrown away: with fewer ranks nobody would have
    begun them. Yields how far it has come.
    """
    size = min(settings.batch_size, settings.rows)
    most = math.ceil(settings.rows * settings.attempts / size)
    started = time.perf_counter()
    for first in range(0, most, ranks.world_size):
        number = first + ranks.rank

        def drafts(number: int = number) -> list[Draft]:
            # In step, a rank without a batch writes one that does not count.
            return author.write(writer, number, size=size) if number < most or writer.in_step else []

        for batch, written in enumerate(ranks.gathered(drafts), first):
            for draft in written if batch < most else ():
                sifter.take(draft)
        yield WritingProgress(
            rows=len(sifter.rows),
            wanted=settings.rows,
            num_tokens=sifter.num_tokens,
            seconds=time.perf_counter() - started,
            left_out=sifter.told(),
        )
        if sifter.is_full:
            return
    if not sifter.rows:
        raise RemedyError(
            f"the model wrote no row that could be kept in {most * size} attempts (left out: {sifter.told()}); raise "
            "max_new_tokens and max_prompt_tokens where rows are cut, set another kind where they are empty, or give "
            "rows as keep.data"
        )


def _tell_of_fewer(sifter: Sifter, settings: OwnRows) -> None:
    if not sifter.is_full:
        logger.warning(
            "the model wrote %d of the %d rows that were asked for, in %d attempts for each (left out: %s); raise "
            "max_new_tokens where rows are cut, temperature where they are repeated, or attempts",
            len(sifter.rows),
            settings.rows,
            settings.attempts,
            sifter.told(),
        )


def _log(progress: WritingProgress) -> None:
    logger.info("%s", progress)
