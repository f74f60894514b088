"""The rows of a run's stages as tokens: prepared by one process of each node, mapped by all of its ranks."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, get_training_chat_template

from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.data.apart import prepare_all
from epi_ds.data.once import once_per_node
from epi_ds.data.preparing import Tokens
from epi_ds.data.rendering import Learnt, has_marks
from epi_ds.data.sources import SkillRows
from epi_ds.data.store import Summary, open_store, read_summary
from epi_ds.data.table import Table
from epi_ds.errors import UserError
from epi_ds.launch.environment import cache_folder
from epi_ds.recipe.models import ModelSection, Recipe, Stage
from epi_ds.recipe.sources import TrainingData
from epi_ds.train.model import told
from epi_ds.train.stages import StageRows
from epi_ds.train.streams import SourceShare, TableRows

logger = logging.getLogger(__name__)

# More processes than these wait for the one that reads.
_MOST_PROCESSES = 8


class SourceRows(NamedTuple):
    """The tokenised rows of one source, and what became of the others."""

    rows: Dataset
    summary: Summary


class RowArguments(NamedTuple):
    """Those of a recipe's ``train`` that decide how conversations become tokens, by TRL's names and defaults."""

    max_length: int | None
    truncation_mode: str
    packing: bool
    packing_strategy: str
    assistant_only_loss: bool
    completion_only_loss: bool | None
    chat_template_path: str | None
    eos_token: str | None
    dataset_num_proc: int | None
    seed: int


def argument_of(recipe: Recipe, name: str) -> Any:
    """Return what a recipe's ``train`` says, and TRL's default where it says nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    return recipe.train.get(name, defaults[name])


def global_batch_of(recipe: Recipe, *, ranks: int) -> int:
    """Return how many rows a step of a recipe trains."""
    micro_batch, accumulation = (
        int(argument_of(recipe, name)) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    return micro_batch * accumulation * ranks


def row_arguments_of(recipe: Recipe) -> RowArguments:
    """Return what a recipe's ``train`` says of rows, and TRL's default where it says nothing.

    Raises UserError for packing without a length.
    """
    found = RowArguments(*(argument_of(recipe, name) for name in RowArguments._fields))
    if found.packing and found.max_length is None:
        raise UserError("train.packing puts rows into sequences of train.max_length tokens, which is null; set it")
    return found


def load_tokenizer(model: ModelSection, arguments: RowArguments, *, what: str = "model.path") -> Any:
    """Return the tokenizer that a run trains with: the model's, with the template and the end mark of ``arguments``.

    what  names the path in messages

    Raises UserError for one without a chat template, and what `told` raises.
    """
    with told(model.path, what=what):
        tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision)
    template = arguments.chat_template_path
    if template is not None and Path(template).is_file():
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"train.chat_template_path {template} is not UTF-8 ({error}); save it as UTF-8") from error
    elif template is not None:
        # As TRL does once more when it has the model, whose embedding then grows.
        with told(template, what="train.chat_template_path"):
            other = AutoTokenizer.from_pretrained(template)
        tokenizer.chat_template = other.get_chat_template()
        tokenizer.add_tokens([one for one in other.added_tokens_decoder.values() if one.content not in tokenizer.vocab])
        tokenizer.eos_token = other.eos_token
    if arguments.eos_token is not None:
        tokenizer.eos_token = arguments.eos_token
    if tokenizer.chat_template is None:
        raise UserError(
            f"{model.path} has no chat template, so conversations cannot be written as text; set "
            "train.chat_template_path to a template file or to a model that has one"
        )
    return tokenizer


def tokens_of(arguments: RowArguments, tokenizer: Any) -> Tokens:
    """Return how conversations become tokens under the arguments of a recipe."""
    template = None
    if arguments.assistant_only_loss:
        learnt = Learnt.ASSISTANT_TURNS
        if not has_marks(tokenizer.get_chat_template()):
            # Of templates that TRL knows it has a version that marks answers; in others they are found by rendering.
            with suppress(ValueError):
                template = get_training_chat_template(tokenizer)
    else:
        learnt = Learnt.EVERYTHING if arguments.completion_only_loss is False else Learnt.LAST_TURN
    return Tokens(
        tokenizer=tokenizer,
        learnt=learnt,
        template=template,
        max_length=arguments.max_length,
        keeps_end=arguments.truncation_mode == "keep_end",
        packing=arguments.packing_strategy if arguments.packing else None,
    )


class Source(Protocol):
    """Where rows come from."""

    def resolve(self, *, seed: int) -> Table | SkillRows:
        """See `DataSource.resolve`."""


def prepare_here(sources: Sequence[Source], arguments: RowArguments, tokenizer: Any) -> list[Path]:
    """Return the folders of the sources' stores, which are written where they are not there yet. In this process alone.

    Raises UserError for what the sources cannot be, and RemedyError for what is in the way.
    """
    num_processes = arguments.dataset_num_proc or min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    found = [source.resolve(seed=arguments.seed) for source in sources]
    cache = cache_folder() / "data"
    folders = prepare_all(found, tokens_of(arguments, tokenizer), cache=cache, num_processes=num_processes)
    return [Path(folder) for folder in folders]


def prepare_rows(sources: Sequence[Source], arguments: RowArguments, tokenizer: Any) -> list[SourceRows]:
    """Return the rows of sources, tokenised. Every rank of a launcher calls it; none waits in a collective meanwhile.

    Raises, on all ranks of the node, what `prepare_here` raises, and LostRankError where the process that prepares the
    rows died.
    """
    # Right away, while no rank is behind: it tells the files of this start from those of others.
    attempt = on_first_rank(lambda: uuid.uuid4().hex)
    folders = once_per_node(
        cache_folder() / "data" / "starts" / attempt,
        lambda: [str(folder) for folder in prepare_here(sources, arguments, tokenizer)],
        is_worker=int(os.environ.get("LOCAL_RANK", 0)) == 0,
    )
    found = [rows_in(Path(folder)) for folder in folders]
    if dist.get_rank() == 0:
        for source in found:
            for level, text in source.summary.told:
                logger.log(level, "%s", text)
    return found


def rows_in(folder: Path) -> SourceRows:
    """Return the rows of a store."""
    return SourceRows(open_store(folder), read_summary(folder))


def table_of(sources: Sequence[TrainingData], num_rows: Sequence[int]) -> TableRows:
    """Return what the plan of a run needs to know of sources of so many rows, which are drawn from together."""
    shares = tuple(
        SourceShare(count, source.share)
        for count, source in zip(num_rows, sources, strict=True)
        if source.share is not None
    )
    return TableRows(sum(num_rows), shares)


def stage_rows_of(stage: Stage, num_rows: Sequence[int]) -> StageRows:
    """Return what the plan of a run needs to know of a stage whose sources have so many rows."""
    table = table_of(stage.sources, num_rows)
    return StageRows(stage.name, table.num_rows, stage.epochs, table.shares, stage.steps)


def digests_of(found: Sequence[SourceRows]) -> list[dict[str, Any]]:
    """Return what a resume has to find again: the digests of the files of every source, and how many rows they gave."""
    return [{"digests": sorted(one.summary.digests.values()), "rows": one.summary.num_rows} for one in found]
