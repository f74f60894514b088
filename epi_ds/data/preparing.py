"""From a source to its store: rows are read, rendered, tokenised, cut and counted, once for all ranks and starts."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from epi_ds.data.conversation import Conversation
from epi_ds.data.remarks import Remarks
from epi_ds.data.rendering import Encoded, Learnt, Renderer
from epi_ds.data.sources import SkillRows, skill_conversations
from epi_ds.data.store import NOT_LEARNT, ROWS, Summary, Writer, claimed, digest_of, key_of, read_summary, seal
from epi_ds.data.table import Reading, Table, describe, read_table
from epi_ds.errors import RemedyError, UserError

# Of what a store holds: another number makes all stores anew.
_VERSION = 2
# Fewer rows are tokenised before other processes would have started.
_SINGLE_ROWS = 4096
_CHUNK_ROWS = 128
# The packing that cuts rows longer than a sequence, as no packing does.
_CUTTING = "bfd"


PlacedRow: TypeAlias = tuple[str, Conversation]
"""A row, and where it is for messages."""
PlacedTokens: TypeAlias = tuple[str, Encoded]


class Tokens(NamedTuple):
    """How conversations become tokens."""

    tokenizer: Any
    """A tokenizer of transformers with the template that is used."""
    learnt: Learnt
    template: str | None
    """Another template than the tokenizer's own."""
    max_length: int | None
    keeps_end: bool
    """Whether rows that are too long lose their beginning, and not their end."""
    packing: str | None
    """Strategy of ``trl.pack_dataset``, or None."""


class Prepared(NamedTuple):
    """A store and what it holds."""

    folder: Path
    summary: Summary


@dataclass
class _Counts:
    rows: int = 0
    tokens: int = 0
    learnt: int = 0
    cut: int = 0
    unlearnt: int = 0
    whole: int = 0
    """Rows of which every token is learnt, and should not be."""
    sequences_unlearnt: int = 0
    """Packed sequences that were left out because nothing in them is learnt."""
    longest: int = 0
    lengths: list[int] = field(default_factory=list)


def prepare(source: Table | SkillRows, tokens: Tokens, *, cache: Path, num_processes: int) -> Prepared:
    """Return the store of a source, which is written where the cache has none of its content and settings.

    Raises UserError for rows that cannot be read, rendered or learnt from.
    """
    digests = {str(path): digest_of(path) for path in source.files} if isinstance(source, Table) else {}
    folder = cache / key_of({"version": _VERSION, "source": _key(source, digests), "tokens": _tokens_key(tokens)})
    try:
        with claimed(folder) as begun:
            if begun is not None:
                seal(begun, _write(source, tokens, begun, digests, num_processes))
    except OSError as error:
        raise RemedyError(
            f"{cache}, where prepared rows are kept, cannot be written: {error}; free it, or set EPI_DS_CACHE to "
            "another folder"
        ) from error
    return Prepared(folder, read_summary(folder))


def _key(source: Table | SkillRows, digests: dict[str, str]) -> Any:
    if isinstance(source, SkillRows):
        return source._asdict()
    # Where files lie does not change what is in them, but their order does.
    return {**source._asdict(), "files": list(digests.values())}


def _tokens_key(tokens: Tokens) -> Any:
    tokenizer = tokens.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    own = {"vocabulary": vocabulary, "template": tokenizer.chat_template, "special": tokenizer.special_tokens_map}
    return {**tokens._asdict(), "tokenizer": own}


def _write(
    source: Table | SkillRows, tokens: Tokens, folder: Path, digests: dict[str, str], num_processes: int
) -> Summary:
    reading, counts, remarks = Reading(), _Counts(), Remarks()
    if isinstance(source, Table):
        name, rows = source.name, read_table(source, reading)
    else:
        name = f"skill {source.skill}"
        drawn = skill_conversations(source)
        rows = ((f"{name}, row {number}", row) for number, row in enumerate(drawn, 1))
    writer = Writer(folder / ROWS)
    for place, row in _encoded(rows, tokens, num_processes):
        remarks.add(place, row.remarks)
        if (fitting := _fit(row, tokens, counts)) is not None:
            writer.write(fitting)
    writer.close()
    _refuse_nonsense(name, tokens, counts)
    if tokens.packing is not None:
        _pack(folder, tokens, counts)
    told = list(describe(source, reading)) if isinstance(source, Table) else []
    return Summary(
        num_rows=counts.rows,
        num_tokens=counts.tokens,
        num_learnt=counts.learnt,
        num_cut=counts.cut,
        num_unlearnt=counts.unlearnt,
        longest=counts.longest,
        lengths=tuple(counts.lengths),
        digests=digests,
        told=(*told, *remarks.told(name), *_warnings(name, tokens, counts)),
    )


def _fit(row: Encoded, tokens: Tokens, counts: _Counts) -> Encoded | None:
    """Cut a row to the longest length and count it; None where nothing learnt is left of it."""
    length = len(row.input_ids)
    counts.longest = max(counts.longest, length)
    bin_ = length.bit_length()
    counts.lengths += [0] * (bin_ + 1 - len(counts.lengths))
    counts.lengths[bin_] += 1
    counts.whole += all(row.learnt) and not row.is_wholly_learnt
    # What other strategies find too long goes on in another sequence.
    limit = tokens.max_length if tokens.packing in (None, _CUTTING) else None
    cut = limit is not None and length > limit
    if limit is not None and cut:
        kept = slice(-limit, None) if tokens.keeps_end else slice(limit)
        row = Encoded(row.input_ids[kept], row.learnt[kept])
    if not any(row.learnt):
        counts.unlearnt += 1
        return None
    counts.rows += 1
    counts.cut += cut
    counts.tokens += len(row.input_ids)
    counts.learnt += sum(row.learnt)
    return row


def _refuse_nonsense(name: str, tokens: Tokens, counts: _Counts) -> None:
    if not counts.rows:
        raise UserError(
            f"{name}: the answers of all {counts.unlearnt} rows lie beyond train.max_length ({tokens.max_length} "
            f"tokens; the longest row has {counts.longest}), so nothing would be learnt; set train.max_length higher"
        )
    if tokens.learnt is not Learnt.EVERYTHING and counts.whole == counts.rows + counts.unlearnt and counts.rows > 1:
        raise UserError(
            f"{name}: the loss would be on every token of all rows, prompts included, because the chat template writes "
            "prompts otherwise once an answer follows; set train.chat_template_path, or train.completion_only_loss: "
            "false if that is meant"
        )


def _warnings(name: str, tokens: Tokens, counts: _Counts) -> Iterator[tuple[int, str]]:
    if counts.sequences_unlearnt:
        yield (
            logging.WARNING,
            f"{name}: left out {counts.sequences_unlearnt} packed sequences of {tokens.max_length} tokens, which hold "
            "prompts alone; set train.max_length higher, or packing_strategy: bfd",
        )
    if counts.unlearnt:
        yield (
            logging.WARNING,
            f"{name}: left out {counts.unlearnt} of {counts.rows + counts.unlearnt} rows, whose answers lie beyond "
            f"train.max_length ({tokens.max_length} tokens; the longest row has {counts.longest})",
        )
    if counts.cut:
        yield (
            logging.WARNING,
            f"{name}: {counts.cut} of {counts.rows} rows are longer than train.max_length ({tokens.max_length} tokens; "
            f"the longest has {counts.longest}) and lose their {'beginning' if tokens.keeps_end else 'end'}",
        )


def _pack(folder: Path, tokens: Tokens, counts: _Counts) -> None:
    """Put rows together into sequences; those in which nothing is learnt are left out. Counts tokens anew."""
    import pyarrow
    from datasets import Dataset
    from trl import pack_dataset

    unpacked = folder / "unpacked.arrow"
    (folder / ROWS).rename(unpacked)
    rows = Dataset.from_file(str(unpacked))
    packed = pack_dataset(rows, tokens.max_length, tokens.packing, {"keep_in_memory": True})
    learnt = [sum(label != NOT_LEARNT for label in labels) for labels in packed["labels"]]
    kept = [index for index, count in enumerate(learnt) if count]
    counts.sequences_unlearnt = len(learnt) - len(kept)
    chosen = packed.select(kept)
    counts.learnt, counts.tokens = sum(learnt), sum(len(ids) for ids in chosen["input_ids"])
    table = chosen.with_format("arrow")[:] if kept else packed.data.table.slice(0, 0)
    with (folder / ROWS).open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table.combine_chunks(), max_chunksize=64)
    unpacked.unlink()


# --- in several processes ---

_own: list[Renderer] = []
"""The renderer of a process that only tokenises."""


def _encoded(rows: Iterator[PlacedRow], tokens: Tokens, num_processes: int) -> Iterator[PlacedTokens]:
    """Yield rows as tokens, in their order, tokenised by several processes where that is worth their start."""
    renderer = Renderer(tokens.tokenizer, learnt=tokens.learnt, template=tokens.template)
    alone = rows if num_processes < 2 else itertools.islice(rows, _SINGLE_ROWS)
    yield from ((row[0], _encode(renderer, *row)) for row in alone)
    if num_processes > 1:
        yield from _encoded_by_processes(rows, renderer, num_processes)


def _encoded_by_processes(rows: Iterator[PlacedRow], renderer: Renderer, num_processes: int) -> Iterator[PlacedTokens]:
    # As forks they have the tokenizer already; its own threads would not survive that.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fork = multiprocessing.get_context("fork")
    chunks = iter(lambda: list(itertools.islice(rows, _CHUNK_ROWS)), [])
    with ProcessPoolExecutor(num_processes, fork, initializer=_own.append, initargs=(renderer,)) as pool:
        # Never more than these: all that is read ahead is held.
        waiting = deque(pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 4 * num_processes))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 1))
        except BrokenProcessPool as error:
            if sys.version_info < (3, 11, 5):
                # Else the pool waits for ever for its thread that is writing rows which nobody reads (gh-94777).
                pool._call_queue._reader.close()  # type: ignore[attr-defined]
            raise RemedyError(
                "a process that tokenises was killed; look for the kernel's out-of-memory killer (dmesg), and set "
                "train.dataset_num_proc lower"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _encode_chunk(chunk: list[PlacedRow]) -> list[PlacedTokens]:
    return [(row[0], _encode(_own[0], *row)) for row in chunk]


def _encode(renderer: Renderer, place: str, row: Conversation) -> Encoded:
    try:
        return renderer.encode(row)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
