"""The formats that training data comes in, and what a row of each says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from epi_ds.data.calls import functions_of
from epi_ds.data.cells import list_of, text_of, value_of
from epi_ds.data.conversation import Conversation, Message
from epi_ds.data.reading.record import Untyped, plain
from epi_ds.data.turns import messages_of, trained_of
from epi_ds.errors import UserError


class Format(StrEnum):
    """How rows say what they say."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ULTRACHAT = "ultrachat"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    QUESTION_ANSWER = "question_answer"
    LOGIQA = "logiqa"
    TEXT = "text"


class LeftOut(StrEnum):
    """Why a row that is well formed is not trained on. Each is counted."""

    NO_QUESTION = "no question"
    NO_ANSWER = "no answer"
    NO_ASSISTANT = "no turn of the assistant"
    EMPTY_TURN = "a turn without content"
    EMPTY_TEXT = "no text"
    FILTERED = "where says so"


TOOLS = ("tools", "functions")
"""Columns of the functions that a model may call."""


class Columns(NamedTuple):
    """Where rows keep what they say, if named by hand: one column of messages, or prompts and a completion."""

    messages: str | None = None
    prompt: tuple[str, ...] = ()
    completion: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All that are named."""
        return tuple(name for name in (self.messages, *self.prompt, self.completion) if name is not None)


class RowFormat(NamedTuple):
    """How the rows of one source are read."""

    format: Format
    columns: Columns
    used: tuple[str, ...]
    """All columns that are read, those of the system's turn and of tools among them."""

    def read(self, cells: Mapping[str, Any]) -> Conversation | LeftOut:
        """Return what a row says, or why it is left out. Raises UserError for what is no conversation."""
        if not any(name in cells for name in self.used):
            raise UserError(
                f"it has the columns {', '.join(cells)}, and none of {', '.join(self.used)}, by which the first rows "
                "are read; give rows of another form as a source of their own"
            )
        _check_text_only(cells)
        found = _READERS[self.format](cells, self.columns)
        if isinstance(found, LeftOut):
            return found
        if found.text is not None:
            return found if found.text.strip() else LeftOut.EMPTY_TEXT
        return _checked(_with_system_and_tools(found, {name: cells.get(name) for name in self.used}))


_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")


def _check_text_only(cells: Mapping[str, Any]) -> None:
    for name in _NOT_TEXT:
        if cells.get(name) not in (None, [], ""):
            raise UserError(f"it has a column {name}, and only text is trained on; use rows without it")


def _messages(cells: Mapping[str, Any], columns: Columns) -> Conversation | LeftOut:
    cell = list_of(cells.get(str(columns.messages)))
    if cell in (None, [], ""):
        return LeftOut.NO_QUESTION
    messages = messages_of(cell, str(columns.messages))
    return Conversation(tuple(messages), trained=_said(_trained_in(cell, str(columns.messages))))


def _pair(cells: Mapping[str, Any], columns: Columns) -> Conversation | LeftOut:
    prompts = [(name, value_of(cells.get(name))) for name in columns.prompt]
    completion = value_of(cells.get(str(columns.completion)))
    if len(prompts) > 1 and any(_is_list(cell) for _, cell in prompts):
        raise UserError(f"{', '.join(columns.prompt)} cannot be joined where one of them holds turns; name that alone")
    trained: list[bool | None] = []
    if _is_list(prompts[0][1]):
        question = messages_of(prompts[0][1], prompts[0][0])
        trained += _trained_in(prompts[0][1], prompts[0][0])
    else:
        texts = [text_of(cells.get(name), name) for name in columns.prompt]
        question = [{"role": "user", "content": "\n\n".join(text for text in texts if text)}]
        trained.append(None)
    if _is_list(completion):
        answer = messages_of(completion, str(columns.completion))
        trained += _trained_in(completion, str(columns.completion))
        if all(turn["role"] != "assistant" for turn in answer):
            # An answer inside the prompt is none to this.
            return LeftOut.NO_ASSISTANT
        if len(answer) > 1 and answer[0] == question[0]:
            raise UserError(
                f"{columns.completion} begins with the prompt, so it is the whole conversation; set messages: "
                f"{columns.completion} instead of prompt and completion"
            )
    else:
        answer = [{"role": "assistant", "content": text_of(completion, str(columns.completion))}]
        trained.append(None)
    return Conversation((*question, *answer), trained=_said(trained))


def _trained_in(cell: Any, what: str) -> list[bool | None]:
    turns = [cell] if isinstance(cell, Mapping) else cell
    return [trained_of(turn, f"{what}, turn {number}") for number, turn in enumerate(turns, 1)]


def _said(trained: Sequence[bool | None]) -> tuple[bool | None, ...]:
    """Return what turns say of being learnt; nothing where none says anything."""
    return tuple(trained) if any(one is not None for one in trained) else ()


def _is_list(cell: Any) -> bool:
    return isinstance(cell, (list, dict))


def _alpaca(cells: Mapping[str, Any], columns: Columns) -> Conversation:
    turns: list[Message] = []
    for number, pair in enumerate(list_of(cells.get("history")) or (), 1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"history, entry {number} must be a pair of a question and an answer, got {pair!r:.100}")
        turns += _question_and_answer(text_of(pair[0], "history"), text_of(pair[1], "history"))
    given = [text_of(cells.get(name), name) for name in ("instruction", "input")]
    answer = text_of(cells.get("output"), "output")
    return Conversation((*turns, *_question_and_answer("\n\n".join(text for text in given if text), answer)))


def _ultrachat(cells: Mapping[str, Any], columns: Columns) -> Conversation | LeftOut:
    texts = list_of(cells.get(str(columns.messages)))
    if not texts:
        return LeftOut.NO_QUESTION
    if not _is_list(texts):
        raise UserError(f"{columns.messages} must be a list of turns that alternate, got {texts!r:.100}")
    return Conversation(
        tuple(
            {
                "role": "assistant" if index % 2 else "user",
                "content": text_of(text, f"{columns.messages}, turn {index + 1}"),
            }
            for index, text in enumerate(texts)
        )
    )


def _logiqa(cells: Mapping[str, Any], columns: Columns) -> Conversation | LeftOut:
    options, answer = list_of(cells.get("options")), plain(cells.get("answer"))
    if isinstance(answer, Untyped) and answer.strip().isdecimal():
        answer = int(answer)
    if answer is None:
        return LeftOut.NO_ANSWER
    if not isinstance(options, list) or not isinstance(answer, int) or not 0 <= answer < len(options) <= 26:
        raise UserError(
            f"answer must be the position of one of the options, from 0, got {answer!r} of {options!r:.100}"
        )
    letters = [chr(ord("A") + index) for index in range(len(options))]
    listed = "\n".join(f"{letter}. {text_of(text, 'options')}" for letter, text in zip(letters, options, strict=True))
    parts = [text_of(cells.get("text"), "text"), text_of(cells.get("question"), "question"), listed]
    return Conversation(_question_and_answer("\n\n".join(part for part in parts if part), letters[answer]))


def _text(cells: Mapping[str, Any], columns: Columns) -> Conversation:
    return Conversation(text=text_of(cells.get("text"), "text"))


def _question_and_answer(question: str, answer: str) -> tuple[Message, Message]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


_READERS: Mapping[Format, Callable[[Mapping[str, Any], Columns], Conversation | LeftOut]] = {
    Format.MESSAGES: _messages,
    Format.SHAREGPT: _messages,
    Format.ULTRACHAT: _ultrachat,
    Format.ALPACA: _alpaca,
    Format.PROMPT_COMPLETION: _pair,
    Format.QUESTION_ANSWER: _pair,
    Format.LOGIQA: _logiqa,
    Format.TEXT: _text,
}


def _with_system_and_tools(found: Conversation, cells: Mapping[str, Any]) -> Conversation:
    messages, trained = found.messages, found.trained
    if system := text_of(cells.get("system"), "system"):
        if messages and messages[0]["role"] == "system":
            raise UserError("the column system and the first turn both say what the system says; remove one of them")
        messages = ({"role": "system", "content": system}, *messages)
        trained = (None, *trained) if trained else ()
    return Conversation(messages, _tools_of(cells), trained)


def _tools_of(cells: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the functions that a row names in a column of either name: OpenAI called it ``functions`` at first."""
    found = {name: functions_of(cells.get(name), name) for name in TOOLS}
    if all(found.values()):
        raise UserError(f"the columns {' and '.join(TOOLS)} both say which functions there are; remove one of them")
    return next((functions for functions in found.values() if functions), ())


def _checked(found: Conversation) -> Conversation | LeftOut:
    """Return a conversation that can be learnt from: it ends with what the assistant says last.

    Raises UserError where a turn behind that one is to be learnt.
    """
    roles = [message["role"] for message in found.messages]
    if "assistant" not in roles:
        return LeftOut.NO_ASSISTANT
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if not last:
        return LeftOut.NO_QUESTION
    if any(found.trained[last + 1 :]):
        raise UserError(
            f"a turn of the {roles[-1]} is to be learnt, because of its weight, and nothing of the assistant follows "
            "it; remove the weight, or the turn"
        )
    whole = Conversation(
        found.messages[: last + 1], found.tools, found.trained[: last + 1], num_cut_turns=len(roles) - 1 - last
    )
    silent = [index for index, message in enumerate(whole.messages) if not _says_something(message)]
    if not silent:
        return whole
    return {last: LeftOut.NO_ANSWER, last - 1: LeftOut.NO_QUESTION}.get(silent[-1], LeftOut.EMPTY_TURN)


def _says_something(message: Message) -> bool:
    """Whether a turn has content. A function may return nothing, and a system may say nothing."""
    if message["role"] not in ("user", "assistant"):
        return True
    return bool(str(message["content"]).strip()) or "tool_calls" in message
