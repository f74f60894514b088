"""From conversations to tokens, and which of them are learnt: the one rule of training and evaluation.

An answer begins where the prompt with its generation prompt and the whole conversation part, token by token. Where a
template renders a prompt alone as it does inside the whole, that is behind the generation prompt; where it does not (a
generation prompt may end in an empty thought that no conversation has), it is where the model is asked to differ.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from epi_ds.data.conversation import Conversation, Message
from epi_ds.data.digits import Digits
from epi_ds.data.remarks import Remark, RemarkKind
from epi_ds.data.special_tokens import SpecialTokens
from epi_ds.data.turn_spans import MARK, Span, TurnSpans, common_prefix_length
from epi_ds.errors import UserError


class Learnt(StrEnum):
    """Which tokens of a conversation the loss is on. A row that marks its turns decides for those itself."""

    LAST_TURN = "last turn"
    ASSISTANT_TURNS = "assistant's turns"
    EVERYTHING = "everything"


class Encoded(NamedTuple):
    """One row as it is trained on."""

    input_ids: list[int]
    learnt: list[bool]
    """For every token whether the loss is on it."""
    is_wholly_learnt: bool = False
    """Whether every token is meant to be: of a document, or where the loss is on everything."""
    remarks: tuple[Remark, ...] = ()
    """What is to be told of the row."""


class BegunTurn(NamedTuple):
    """A turn that somebody is yet to write."""

    ids: list[int]
    """The tokens before it."""
    end: int | None
    """The special token that ends it; None for none."""


_UNTELLABLE = (
    "the chat template does not let us tell where the turns stand that are to be learnt; mark what the assistant says "
    "by {% generation %} in it, or leave out train.assistant_only_loss and weights of turns"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Keys of rows and turns that a template has to know by name to say anything of them.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_NAMED_IN_TEMPLATE = ("tools", "tool_calls", *_THOUGHTS)


class Renderer:
    """Writes conversations with the chat template of one tokenizer.

    tokenizer  a fast tokenizer of transformers; it is not changed
    learnt     what the loss is on where a row does not say
    template   another template than the tokenizer's own
    """

    def __init__(self, tokenizer: Any, *, learnt: Learnt, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._learnt = learnt
        self._template: str = template if template is not None else tokenizer.get_chat_template()
        self._marks_answers = has_marks(self._template)
        self._special = SpecialTokens(tokenizer)

    def encode(self, conversation: Conversation) -> Encoded:
        """Return a row's tokens and which of them are learnt.

        Raises UserError for a row that the template refuses or would say in part only, and for one of which nothing is
        learnt because its turns say so.
        """
        if conversation.text is not None:
            found = self._encode_document(conversation.text)
        else:
            found = self._encode_conversation(conversation)
        remarks = (*found.remarks, *self._special.remarks(conversation), *self._unknown_keys(conversation))
        return found._replace(remarks=remarks) if remarks else found

    def _encode_conversation(self, conversation: Conversation) -> Encoded:
        whole = self.text(conversation.messages, conversation)
        _check_whole(conversation, whole)
        if conversation.trained or self._learnt is Learnt.ASSISTANT_TURNS:
            return self._encode_turns(conversation, whole)
        ids = self._tokens(whole)
        if self._learnt is Learnt.EVERYTHING:
            return Encoded(ids, [True] * len(ids), is_wholly_learnt=True)
        prompt = self.ids(conversation.prompt, conversation, prompt=True)
        start = common_prefix_length(prompt, ids)
        if start < len(prompt) and not whole.startswith(self.text(conversation.prompt, conversation)):
            # Not the generation prompt is another, but turns before it: all that follows would be learnt, too.
            return self._encode_turns(conversation, whole)
        return Encoded(ids, [False] * start + [True] * (len(ids) - start))

    def ids(self, messages: Sequence[Message], row: Conversation, *, prompt: bool = False) -> list[int]:
        """Return the tokens of some turns of a row; with ``prompt`` the assistant is asked to go on."""
        return self._tokens(self.text(messages, row, prompt=prompt))

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokens_and_ends(self, text: str) -> list[tuple[int, int]]:
        """Return the tokens of a text, each with the character behind its last."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = (stop for _, stop in found["offset_mapping"])
        return list(zip(found["input_ids"], ends, strict=True))

    def _encode_document(self, text: str) -> Encoded:
        end = self._tokenizer.eos_token_id
        if end is None:
            raise UserError("the tokenizer has no end token to end a document with; set train.eos_token")
        ids = self._tokenizer(text)["input_ids"]
        ids = ids if ids and ids[-1] == end else [*ids, end]
        return Encoded(ids, [True] * len(ids), is_wholly_learnt=True)

    def text(self, messages: Sequence[Message], row: Conversation, *, prompt: bool = False) -> str:
        """Return what the template writes for some turns of a row. Raises UserError where it refuses them."""
        self._check_names(messages, row)
        digits = Digits()
        turns = digits.hide(messages)
        # A template may leave out parts of what functions take, but nothing of a call.
        in_turns = len(digits)
        try:
            written = str(
                self._tokenizer.apply_chat_template(
                    turns,
                    tools=digits.hide(row.tools) or None,
                    chat_template=self._template,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:
            # Templates are programs: theirs fail with jinja2's errors, TypeError, KeyError and what else they call.
            raise UserError(f"the chat template refuses the row: {error}") from error
        if (lost := digits.lost_in(written, in_turns)) is not None:
            raise UserError(
                f"the chat template does not write the number {lost} of a turn as it is; write it as a text in the "
                "data, or set train.chat_template_path to one that does"
            )
        written = digits.restore(written)
        try:
            written.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the row holds half of a character (\\u{ord(written[error.start]):04x}, a lone surrogate), which no "
                "tokenizer takes; write the row again from its source"
            ) from error
        return written

    def end_of_turn(self) -> int | None:
        """Return the token that ends what the assistant says last: the first special one behind it; None for none."""
        turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": MARK})
        return self._first_special(self.text(turns, Conversation(turns)).rpartition(MARK)[2])

    def user_turn(self) -> BegunTurn:
        """Return how the template begins what a user says first, and how it ends it."""
        turns = ({"role": "user", "content": MARK},)
        begun, _, rest = self.text(turns, Conversation(turns)).partition(MARK)
        return BegunTurn(self._tokens(begun), self._first_special(rest))

    def _first_special(self, end: str) -> int | None:
        added = self._tokenizer.added_tokens_decoder
        special = {*self._tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        return next((one for one in self._tokens(end) if one in special), None)

    def _check_names(self, messages: Sequence[Message], row: Conversation) -> None:
        keys = {key for message in messages for key in message} | ({"tools"} if row.tools else set())
        for key in _NAMED_IN_TEMPLATE:
            if key in keys and not self._knows(key):
                raise UserError(
                    f"the chat template has no place for {key}, and the row would be trained without; use a model "
                    f"whose template has one, train.chat_template_path, or rows without {key}"
                )
        if any(message["role"] == "developer" for message in messages) and "developer" not in self._template:
            raise UserError("the chat template knows no role developer; call it system in the data")

    def _unknown_keys(self, row: Conversation) -> tuple[Remark, ...]:
        known = ("role", "content", "name", "tool_call_id", *_NAMED_IN_TEMPLATE)
        keys = dict.fromkeys(key for message in row.messages for key in message if key not in known)
        return tuple(Remark(RemarkKind.UNKNOWN_KEY, key) for key in keys if key not in self._template)

    def _knows(self, key: str) -> bool:
        # transformers gives a thought under all of its names.
        names = _THOUGHTS if key in _THOUGHTS else (key,)
        return any(name in self._template for name in names)

    # --- turns ---

    def _encode_turns(self, row: Conversation, whole: str) -> Encoded:
        if not self._tokenizer.is_fast:
            raise UserError(
                "a loss on single turns needs to know which text a token stands for, and this tokenizer is a slow one "
                "that does not say; use its fast version, or leave out train.assistant_only_loss and weights of turns"
            )
        marks = row.trained or (None,) * len(row.messages)
        wanted = [self._is_learnt(index, mark, row) for index, mark in enumerate(marks)]
        if not any(wanted):
            raise UserError("none of the row's turns is to be learnt, because of its weights; remove the row")
        chosen = [index for index, learn in enumerate(wanted) if learn]
        spans = self._marked_spans(row, whole) if self._marks_answers else None
        if spans is None:
            finder = TurnSpans(
                row.messages, whole, lambda turns, asks: self.text(turns, row, prompt=asks), self.tokens_and_ends
            )
            spans = finder.find(chosen)
        found = [spans[index] for index in chosen if index in spans]
        if not found:
            raise UserError(_UNTELLABLE)
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        learnt = list(_are_inside(encoded["offset_mapping"], found))
        remarks = _remarks(row, whole, chosen, spans)
        return Encoded(list(encoded["input_ids"]), learnt, remarks=remarks)

    def _is_learnt(self, index: int, mark: bool | None, row: Conversation) -> bool:
        if mark is not None:
            return mark
        if self._learnt is Learnt.LAST_TURN:
            return index == len(row.messages) - 1
        return self._learnt is Learnt.EVERYTHING or row.messages[index]["role"] == "assistant"

    def _marked_spans(self, row: Conversation, whole: str) -> dict[int, Span] | None:
        """Return what a template with generation marks says are the assistant's turns; None if it marks others too."""
        from transformers.utils.chat_template_utils import render_jinja_template

        digits = Digits()
        rendered, marked = render_jinja_template(
            [digits.hide(row.messages)],
            tools=digits.hide(row.tools) or None,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        turns = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        if digits.restore(rendered[0]) != whole or len(marked[0]) != len(turns):
            return None
        spans = [Span(*(len(digits.restore(rendered[0][:at])) for at in span)) for span in marked[0]]
        return dict(zip(turns, spans, strict=True))


def _are_inside(tokens: Sequence[tuple[int, int]], spans: Sequence[Span]) -> Iterator[bool]:
    """Yield for every token, by its characters, whether any of them is in one of the spans."""
    ordered = sorted(spans)
    # Where spans overlap, the one that begins first may not be the one that ends first.
    stops = list(itertools.accumulate((span.stop for span in ordered), max))
    for start, stop in tokens:
        first = bisect.bisect_right(stops, start)
        yield first < len(ordered) and ordered[first].start < stop


def _remarks(row: Conversation, whole: str, chosen: Sequence[int], spans: Mapping[int, Span]) -> tuple[Remark, ...]:
    """Return what is not learnt of turns that are to be learnt."""
    untold = sum(index not in spans for index in chosen)
    unwritten = sum(
        bool(thought) and not _is_in(thought, whole)
        for index in chosen
        if index in spans
        for thought in [_thought_of(row.messages[index])]
    )
    counts = {RemarkKind.UNTOLD_TURN: untold, RemarkKind.UNWRITTEN_THOUGHT: unwritten}
    return tuple(Remark(kind, times=times) for kind, times in counts.items() if times)


def _thought_of(message: Message) -> str:
    thought = str(message["content"]).rpartition("</think>")[0].rpartition("<think>")[2].strip()
    return thought or next((str(message[name]).strip() for name in _THOUGHTS if message.get(name)), "")


def _check_whole(row: Conversation, written: str) -> None:
    """Raise UserError where a template leaves out what a turn says, but for thoughts of turns before the last."""
    last = len(row.messages)
    for number, message in enumerate(row.messages, 1):
        thought, _, said = str(message["content"]).rpartition("</think>")
        parts = [said]
        if number == last:
            parts += [thought.rpartition("<think>")[2], *(str(message.get(name) or "") for name in _THOUGHTS)]
        for part in parts:
            if not _is_in(part.strip(), written):
                raise UserError(
                    f"the chat template leaves out what the {message['role']} says in turn {number} "
                    f"({part.strip()!r:.60}); set train.chat_template_path to one that writes all of a row"
                )


def _is_in(text: str, written: str) -> bool:
    if text in written:
        return True
    # Results of functions are written as JSON by some.
    return any(json.dumps(text, ensure_ascii=escaped)[1:-1] in written for escaped in (True, False))


def has_marks(template: str) -> bool:
    """Whether a template marks by itself what the assistant says."""
    return _GENERATION.search(template) is not None
