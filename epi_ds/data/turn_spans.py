"""Where turns stand in what a chat template writes of a whole conversation, found by rendering parts of it.

A turn of the assistant begins behind what asks for it, and ends where the conversation up to it ends. Both are known by
rendering the turns before it, which costs the square of a conversation's length if it is done for every turn.

[Note: kinds] What a template writes between two turns depends on who speaks and on what turns have beside their
content, and hardly on how many came before. So turns are sorted into kinds by that; of each the first, the last and
those at a half, a quarter, an eighth ... of the way are found by rendering, which costs about as much as the last one
alone. Where these agree on what leads to a turn and on what leads on behind it, the others are taken to stand between
the same texts, if these are there: where they are not, and where the ones that were rendered differ, each turn is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from epi_ds.data.conversation import Message

Write: TypeAlias = Callable[[Sequence[Message], bool], str]
"""What a template writes of turns; with True the assistant is asked to go on."""
Tokenize: TypeAlias = Callable[[str], list[tuple[int, int]]]
"""The tokens of a text, each with the character behind its last."""

# No template takes it away as white space, and no text has it.
MARK = "\u2063epi-ds\u2063"
_THOUGHT_END = "</think>"
# Of kinds with fewer turns each is rendered.
_FEW = 4
# So many characters around the place where texts part are tokenised, to find the token.
_WINDOW = 64


class Span(NamedTuple):
    """Characters ``[start, stop)`` of a rendered text."""

    start: int
    stop: int


class _Lead(NamedTuple):
    """What stands around the turns of one kind."""

    asks: str
    """Behind what was said before, where the assistant is asked to go on."""
    goes_on: str
    """From the end of a turn to what is said next."""


class TurnSpans:
    """The turns of one conversation.

    messages  all of it
    whole     what the template writes of it
    write     the template; what it raises is raised
    tokenize  the tokenizer: where texts part, they do so between two tokens
    """

    def __init__(self, messages: Sequence[Message], whole: str, write: Write, tokenize: Tokenize) -> None:
        self._messages, self._whole, self._write, self._tokenize = messages, whole, write, tokenize

    def find(self, wanted: Iterable[int]) -> dict[int, Span]:
        """Return where turns stand, with their end marks, by their number; those that cannot be told are missing."""
        wanted = list(wanted)
        kinds = self._kinds(wanted)
        found: dict[int, Span | None] = {}
        if any(len(members) > _FEW for members in kinds.values()) and (said := self._said()) is not None:
            for members in kinds.values():
                if len(members) > _FEW:
                    found.update(self._find_kind(members, said))
        found.update({index: self.rendered(index) for index in wanted if index not in found})
        return {index: span for index in wanted if (span := found[index]) is not None}

    def rendered(self, index: int) -> Span | None:
        """Return where one turn stands, by rendering what leads to it; None where that does not tell."""
        start, stop = self._start(index), self._stop(index)
        return None if start is None or stop is None else Span(start, stop)

    # --- one turn ---

    def _start(self, index: int) -> int | None:
        if not index:
            return 0
        before, whole = self._messages[:index], self._whole
        asked = self._write(before, self._messages[index]["role"] == "assistant")
        start = self._agreed(asked, whole)
        if start == len(asked) or whole.startswith(self._write(before, False)):
            return start
        # Turns before it are written otherwise once this one follows: what was said last before it tells where it is.
        end, asks = self._position(index - 1, [_ended(self._messages[index - 1])]), self._asks(index)
        if end is not None and asks is not None:
            return end + self._agreed(asks, whole[end:])
        return self._position(index, _begun(self._messages[index]))

    def _stop(self, index: int) -> int | None:
        until, whole = self._write(self._messages[: index + 1], False), self._whole
        if whole.startswith(until):
            return len(until)
        # A template that writes a turn otherwise once others follow, such as without its thoughts: a mark at the end of
        # what the turn says tells where that is, and what follows it where the turn is the last.
        marked = _ended(self._messages[index])
        among, alone = (
            self._write((*self._messages[:index], marked, *others), False)
            for others in (self._messages[index + 1 :], ())
        )
        if among.count(MARK) != 1 or alone.count(MARK) != 1:
            return None
        rest, end = among.partition(MARK)[2], alone.partition(MARK)[2]
        if not whole.endswith(rest):
            # Between a text and a call stands white space that a call without a text does not have.
            rest, end = rest.lstrip(), end.lstrip()
        return len(whole) - len(rest) + self._agreed(end, rest) if whole.endswith(rest) else None

    def _asks(self, index: int) -> str | None:
        """Return what the template writes behind the turn before to ask for this one."""
        *before, last = self._messages[:index]
        written = self._write((*before, _ended(last)), self._messages[index]["role"] == "assistant")
        return written.partition(MARK)[2] if written.count(MARK) == 1 else None

    def _position(self, index: int, marked: Iterable[Message]) -> int | None:
        """Return where the mark stands of the first of several versions of a turn that changes nothing else."""
        for turn in marked:
            written = self._write((*self._messages[:index], turn, *self._messages[index + 1 :]), False)
            if written.count(MARK) == 1 and written.replace(MARK, "") == self._whole:
                return written.index(MARK)
        return None

    def _agreed(self, part: str, whole: str) -> int:
        """Return how many characters of a part a whole begins with, up to the token in which they differ.

        `<|endoftext|>` and `<|user|>` have two characters in common, and no token.
        """
        length = common_prefix_length(part, whole)
        if length == len(part):
            return length
        first = max(length - _WINDOW, 0)
        one, other = (self._tokenize(text[first : length + _WINDOW]) for text in (part, whole))
        same = common_prefix_length(one, other)
        return first + one[same - 1][1] if same else first

    # --- many turns, see [Note: kinds] ---

    def _kinds(self, wanted: Sequence[int]) -> dict[Any, list[int]]:
        kinds: dict[Any, list[int]] = {}
        roles = [message["role"] for message in self._messages]
        for index in wanted:
            around = range(index - 1, index + 2)
            if (
                index
                and index + 1 < len(roles)
                and [roles[one] == "assistant" for one in around] == [False, True, False]
            ):
                key = tuple(_kind_of(self._messages[one]) for one in around)
                kinds.setdefault(key, []).append(index)
        return kinds

    def _said(self) -> Mapping[int, Span] | None:
        """Return where the texts of all turns but the assistant's stand; None where marks around them change others."""
        marked = [
            index
            for index, message in enumerate(self._messages)
            if message["role"] != "assistant" and str(message["content"]).strip()
        ]
        turns = list(self._messages)
        for index in marked:
            turns[index] = _ended(_begun(turns[index])[0])
        pieces = self._write(turns, False).split(MARK)
        if len(pieces) != 2 * len(marked) + 1 or "".join(pieces) != self._whole:
            return None
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        return {index: Span(ends[2 * number + 1], ends[2 * number + 2]) for number, index in enumerate(marked)}

    def _find_kind(self, members: Sequence[int], said: Mapping[int, Span]) -> dict[int, Span | None]:
        """Return where turns of one kind stand; those that have to be rendered are missing."""
        if any(index - 1 not in said or index + 1 not in said for index in members):
            return {}
        last = len(members) - 1
        asked = sorted({0, *(last >> halvings for halvings in range(last.bit_length()))})
        found: dict[int, Span | None] = {members[place]: self.rendered(members[place]) for place in asked}
        leads = {self._lead(index, span, said) for index, span in found.items()}
        if len(leads) != 1 or (lead := leads.pop()) is None:
            return found
        # So much of what asks for a turn is there in all of them, whatever they say.
        common = min(span.start - said[index - 1].stop for index, span in found.items() if span is not None)
        for index in members:
            end, stop = said[index - 1].stop, said[index + 1].start - len(lead.goes_on)
            start = end + self._common(lead.asks, end)
            if index not in found and end + common <= start <= stop and self._whole.startswith(lead.goes_on, stop):
                found[index] = Span(start, stop)
        return found

    def _lead(self, index: int, span: Span | None, said: Mapping[int, Span]) -> _Lead | None:
        asks, end = self._asks(index), said[index - 1].stop
        if span is None or asks is None or span.start != end + self._common(asks, end):
            return None
        begin = said[index + 1].start
        return _Lead(asks, self._whole[span.stop : begin]) if span.stop <= begin else None

    def _common(self, asks: str, end: int) -> int:
        return self._agreed(asks, self._whole[end : end + len(asks) + _WINDOW])


def _kind_of(message: Message) -> Any:
    text = str(message["content"])
    beside = {key for key, value in message.items() if key not in ("role", "content") and value not in (None, "", [])}
    # White space at the ends of a text is written as if the template did it.
    ends = (
        (text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]) if message["role"] != "assistant" else ()
    )
    return message["role"], tuple(sorted(beside)), _THOUGHT_END in text, ends


def _begun(message: Message) -> list[Message]:
    """Return a turn with a mark where its text begins: at its thought, or behind one that a template leaves out."""
    text = str(message["content"])
    thought, end, said = text.rpartition(_THOUGHT_END)
    found = [_with(message, "", text)]
    return [*found, _with(message, thought + end, said)] if end else found


def _with(message: Message, before: str, text: str) -> Message:
    # White space at both ends of a text stays there, since templates take it away.
    bare = text.lstrip()
    return {**message, "content": f"{before}{text[: len(text) - len(bare)]}{MARK}{bare}"}


def _ended(message: Message) -> Message:
    text = str(message["content"])
    bare = text.rstrip()
    return {**message, "content": f"{bare}{MARK}{text[len(bare) :]}"}


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items two sequences begin with in common."""
    low, high = 0, min(len(one), len(other))
    # By halves, which Python compares much faster than single items.
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
