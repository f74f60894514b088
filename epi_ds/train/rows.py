"""The rows of a run's stages as tokens: prepared by one process of each node, mapped by all of its ranks."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, get_training_chat_template

from epi_ds.data.apart import prepare_all
from epi_ds.data.once import once_per_node
from epi_ds.data.preparing import Tokens
from epi_ds.data.rendering import Learnt, has_marks
from epi_ds.data.store import Summary, cache_folder, open_store, read_summary
from epi_ds.errors import UserError
from epi_ds.recipe.models import DataSource

logger = logging.getLogger(__name__)

# More processes than these wait for the one that reads.
_MOST_PROCESSES = 8


class SourceRows(NamedTuple):
    """The tokenised rows of one source, and what became of the others."""

    rows: Dataset
    summary: Summary


def load_tokenizer(path: str, args: SFTConfig, *, revision: str | None) -> Any:
    """Return the tokenizer that a run trains with: the model's, with the template and the end mark of ``args``.

    Raises UserError for one without a chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    template = args.chat_template_path
    if template is not None and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template is not None:
        # As TRL does once more when it has the model, whose embedding then grows.
        other = AutoTokenizer.from_pretrained(template)
        tokenizer.chat_template = other.get_chat_template()
        tokenizer.add_tokens([one for one in other.added_tokens_decoder.values() if one.content not in tokenizer.vocab])
        tokenizer.eos_token = other.eos_token
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    if tokenizer.chat_template is None:
        raise UserError(
            f"{path} has no chat template, so conversations cannot be written as text; set train.chat_template_path to "
            "a template file or to a model that has one"
        )
    return tokenizer


def tokens_of(args: SFTConfig, tokenizer: Any) -> Tokens:
    """Return how conversations become tokens under the arguments of a recipe."""
    template = None
    if args.assistant_only_loss:
        learnt = Learnt.ASSISTANT_TURNS
        if not has_marks(tokenizer.get_chat_template()):
            try:
                # Of known templates TRL has a version that marks what the assistant says; others are told by rendering.
                template = get_training_chat_template(tokenizer)
            except ValueError:
                template = None
    else:
        learnt = Learnt.EVERYTHING if args.completion_only_loss is False else Learnt.LAST_TURN
    return Tokens(
        tokenizer=tokenizer,
        learnt=learnt,
        template=template,
        max_length=args.max_length,
        keeps_end=args.truncation_mode == "keep_end",
        packing=args.packing_strategy if args.packing else None,
    )


def prepare_rows(sources: Sequence[DataSource], args: SFTConfig, tokenizer: Any) -> list[SourceRows]:
    """Return the rows of sources, tokenised. Every rank of a launcher calls it; none waits in a collective meanwhile.

    Raises, on all ranks of the node, UserError for what the sources cannot be, RemedyError for what is in the way, and
    LostRankError where the process that prepares them died.
    """
    cache = cache_folder()
    attempt: list[str] = [uuid.uuid4().hex]
    # Right away, while no rank is behind: it tells the files of this start from those of others.
    dist.broadcast_object_list(attempt)
    num_processes = args.dataset_num_proc or min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))

    def work() -> list[str]:
        found = [source.resolve(seed=args.seed) for source in sources]
        return prepare_all(found, tokens_of(args, tokenizer), cache=cache, num_processes=num_processes)

    is_worker = int(os.environ.get("LOCAL_RANK", 0)) == 0
    folders = [Path(folder) for folder in once_per_node(cache / "starts" / attempt[0], work, is_worker=is_worker)]
    found = [SourceRows(open_store(folder), read_summary(folder)) for folder in folders]
    if dist.get_rank() == 0:
        for source in found:
            for level, text in source.summary.told:
                logger.log(level, "%s", text)
    return found


def digests_of(found: Sequence[SourceRows]) -> list[dict[str, Any]]:
    """Return what a resume has to find again: the digests of the files of every source, and how many rows they gave."""
    return [{"digests": sorted(one.summary.digests.values()), "rows": one.summary.num_rows} for one in found]
