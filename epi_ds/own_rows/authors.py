"""How a model is brought to write: a user's turn and its answer, or a text.

A chat template that has begun a user's turn leaves an aligned model to write what it takes for a likely question
(Magpie, arXiv 2406.08464); a base model begins at its beginning-of-text token.

[Note: the same rows] Rows are numbered, and cut into batches, before these are dealt to ranks; the random numbers of a
batch come from its number. So a batch is the same whoever writes it, and the file is the same at every number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from epi_ds.data.conversation import Conversation, conversation_of
from epi_ds.data.rendering import Learnt, Renderer
from epi_ds.errors import UserError
from epi_ds.own_rows.model import WritingModel
from epi_ds.own_rows.sifting import Draft
from epi_ds.recipe.keep import OwnRows, Written


class _Said(NamedTuple):
    """What was generated behind one prompt."""

    text: str
    num_tokens: int
    ended: bool


class Author(Protocol):
    """Writes numbered batches of rows."""

    def write(self, writer: WritingModel, number: int, *, size: int) -> list[Draft]:
        """Return the drafts of the batch of this number, the same on every rank that writes it."""


def author_of(tokenizer: Any, settings: OwnRows, *, stops: Sequence[int]) -> Author:
    """Return who writes rows of the kind that is asked for.

    stops  tokens at which the model stops by itself

    Raises UserError where a tokenizer has not what that takes.
    """
    is_chat = settings.kind is Written.CONVERSATIONS
    if settings.kind is Written.AUTO:
        is_chat = tokenizer.chat_template is not None
    return _Talker(tokenizer, settings, stops) if is_chat else _Narrator(tokenizer, settings, stops)


class _Sampler:
    """Generates behind prompts of tokens."""

    def __init__(self, tokenizer: Any, settings: OwnRows, stops: Sequence[int]) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._stops = {stop for stop in (*stops, tokenizer.eos_token_id) if stop is not None}
        # Any token will do where prompts are padded on the left and masked, and what follows a stop is not read.
        pad = tokenizer.pad_token_id
        self._pad = min(self._stops) if pad is None else pad

    def sample(
        self, writer: WritingModel, prompts: Sequence[Sequence[int]], *, at: int, most: int, stops: Sequence[int] = ()
    ) -> list[_Said]:
        """Return what the model says behind every prompt, in ``most`` tokens at most.

        at  number of the call over all batches. See [Note: the same rows]
        """
        # Once for every call: in step, a rank that has ended goes on until the last one has, with random numbers too.
        torch.manual_seed(seed_of(self._settings.seed, at))
        longest = max(len(prompt) for prompt in prompts)
        padded = [[self._pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        ids = torch.tensor(padded, device=writer.device)
        shown = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=writer.device
        )
        ends = self._stops | set(stops)
        generated = writer.model.generate(
            input_ids=ids,
            attention_mask=shown,
            do_sample=True,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            top_k=0,
            max_new_tokens=most,
            pad_token_id=self._pad,
            eos_token_id=sorted(ends),
            use_cache=True,
            synced_gpus=writer.in_step,
        )
        return [self._said(row, ends) for row in generated[:, longest:].tolist()]

    def _said(self, tokens: list[int], ends: set[int]) -> _Said:
        end = next((index for index, token in enumerate(tokens) if token in ends), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        return _Said(text, len(tokens) if end is None else end + 1, end is not None)


class _Talker:
    """Writes conversations of one question and one answer."""

    def __init__(self, tokenizer: Any, settings: OwnRows, stops: Sequence[int]) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "kind: conversations begins a user's turn with the chat template, and the tokenizer has none; set "
                "kind: texts, or give the tokenizer its template"
            )
        self._renderer = Renderer(tokenizer, learnt=Learnt.LAST_TURN)
        opening = self._renderer.user_turn()
        answer_end = self._renderer.end_of_turn()
        if opening.end is None:
            raise UserError(
                "the chat template ends a user's turn with no special token, so the model cannot tell that its "
                "question has ended; set kind: texts, or give rows as keep.data"
            )
        self._opening, self._settings = opening, settings
        self._sampler = _Sampler(tokenizer, settings, [*stops, *([] if answer_end is None else [answer_end])])

    def write(self, writer: WritingModel, number: int, *, size: int) -> list[Draft]:
        """See `Author.write`."""
        sampler, settings = self._sampler, self._settings
        stops = [] if self._opening.end is None else [self._opening.end]
        asked = sampler.sample(
            writer, [self._opening.ids] * size, at=2 * number, most=settings.max_prompt_tokens, stops=stops
        )
        whole = [index for index, said in enumerate(asked) if said.ended and said.text]
        answers: dict[int, _Said] = {}
        if whole or writer.in_step:
            # In step every rank generates twice, whether it has a question or not.
            questions = [asked[index].text for index in whole] or ["?"]
            prompts = [self._prompt(question) for question in questions]
            said = sampler.sample(writer, prompts, at=2 * number + 1, most=settings.max_new_tokens)
            answers = dict(zip(whole, said, strict=False))
        return [_draft_of(question, answers.get(index)) for index, question in enumerate(asked)]

    def _prompt(self, question: str) -> list[int]:
        row: Conversation = conversation_of([{"role": "user", "content": question}])
        return self._renderer.ids(row.messages, row, prompt=True)


def seed_of(seed: int, at: int) -> int:
    """Mix two numbers into one of 32 bits: on the CPU torch looks at no others."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{at}".encode(), digest_size=4).digest(), "little")


def _draft_of(question: _Said, answer: _Said | None) -> Draft:
    if answer is None:
        return Draft((question.text, ""), question.num_tokens, is_cut=not question.ended)
    return Draft((question.text, answer.text), question.num_tokens + answer.num_tokens, is_cut=not answer.ended)


class _Narrator:
    """Writes texts."""

    def __init__(self, tokenizer: Any, settings: OwnRows, stops: Sequence[int]) -> None:
        # Where texts are only parted by an end mark, they begin behind one.
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise UserError(
                "kind: texts begins at the beginning-of-text token, and the tokenizer has neither that nor an end "
                "mark; set its bos_token, or give rows as keep.data"
            )
        self._begin, self._settings = begin, settings
        self._sampler = _Sampler(tokenizer, settings, stops)

    def write(self, writer: WritingModel, number: int, *, size: int) -> list[Draft]:
        """See `Author.write`."""
        most = self._settings.max_new_tokens
        said = self._sampler.sample(writer, [[self._begin]] * size, at=2 * number, most=most)
        return [Draft((one.text,), one.num_tokens, is_cut=not one.ended) for one in said]
