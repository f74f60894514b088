"""Rows of JSON: a list of objects, one object a line, or a single object. Nothing is guessed, nothing is rounded."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from epi_ds.data.reading.record import Number, Record
from epi_ds.errors import UserError

_CHUNK = 1 << 20
_ENCODING_REMEDY = "save it as UTF-8, for example with iconv -f cp1252 -t utf-8"


class _RepeatedKeyError(ValueError):
    """An object that says one thing twice, of which a reader would silently drop one."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(f"the key {repeated!r} stands twice in one object")
    return found


# Numbers stay as they are written: ids have leading zeros, scores have digits that a float has no room for.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number)


def parse(text: str) -> Any:
    """Return the value of a JSON text, with `Number` for its numbers. Raises ValueError."""
    return _DECODER.decode(text)


def json_lines(stream: BinaryIO, place: Callable[[int], str]) -> Iterator[Record]:
    """Yield one object a line; blank lines are none. ``place`` says where a line is, for messages."""
    for number, line in enumerate(stream, 1):
        text = decode(line, partial(place, number))
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text.strip():
            yield Record(number, _row_of(text, ended=line.endswith(b"\n"), place=place(number)))


def json_list(stream: BinaryIO, place: Callable[[int], str]) -> Iterator[Record]:
    """Yield the objects of one list, without holding more of the text than the row that is read."""
    text = _Text(stream, lambda: place(number + 1))
    number = 0
    text.expect("[", place(1), "a list of rows")
    if text.skip() == "]":
        text.position += 1
    else:
        while True:
            number += 1
            yield Record(number, _checked(text.value(place(number)), place(number)))
            mark = text.skip()
            text.position += 1
            if mark == "]":
                break
            if mark != ",":
                raise UserError(
                    f"{place(number)}: behind a row a comma or the list's end must come, not {mark or 'the end'!r}; "
                    "write the file again, it is cut or damaged"
                )
    if rest := text.skip():
        raise UserError(f"{place(number)}: behind the end of the list stands {rest!r}; remove what follows it")


def single_object(stream: BinaryIO, place: Callable[[int], str]) -> Iterator[Record]:
    """Yield the one object of a file, which may take many lines."""
    text = _Text(stream, lambda: place(1))
    found = _checked(text.value(place(1)), place(1))
    if text.skip():
        raise UserError(f"{place(1)}: a second value follows the first; write one object a line, or a list of objects")
    yield Record(1, found)


def decode(raw: bytes, place: Callable[[], str]) -> str:
    """Return a text, or raise UserError where it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place()}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; {_ENCODING_REMEDY}"
        ) from error


def _row_of(text: str, *, ended: bool, place: str) -> dict[str, Any]:
    try:
        return _checked(parse(text), place)
    except _RepeatedKeyError as error:
        raise UserError(f"{place}: {error}; leave one of them") from error
    except RecursionError as error:
        raise UserError(f"{place}: lists or objects are nested too deeply to be a row") from error
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        if error.msg == "Extra data" and rest == ",":
            remedy = "remove the comma at its end: a line is one object"
        elif error.msg == "Extra data" and rest.startswith("{"):
            remedy = "two rows stand on it: put each on a line of its own"
        elif not ended:
            remedy = "the file ends in the middle of a row: it is cut, write or copy it again"
        else:
            remedy = "a line must be one whole JSON object"
        raise UserError(f"{place} is no JSON ({error.msg}, column {error.colno}); {remedy}") from error


def _checked(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: a row must be an object with named columns, not {str(value)!r:.80}")
    return value


class _Text:
    """The text of a stream, as much of it as is being read."""

    def __init__(self, stream: BinaryIO, place: Callable[[], str]) -> None:
        self._stream, self._place = stream, place
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._ended = False
        self.position = 0

    def skip(self) -> str:
        """Move to what is no white space and return it; empty at the end."""
        while True:
            while self.position < len(self._text) and self._text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def expect(self, mark: str, place: str, what: str) -> None:
        """Move behind a mark. Raises UserError where there is another."""
        if (found := self.skip()) != mark:
            raise UserError(f"{place}: {what} begins with {mark!r}, not {found!r}")
        self.position += 1

    def value(self, place: str) -> Any:
        """Return the JSON value here and move behind it. Raises UserError where there is none."""
        self.skip()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self.position)
            except _RepeatedKeyError as error:
                raise UserError(f"{place}: {error}; leave one of them") from error
            except RecursionError as error:
                raise UserError(f"{place}: lists or objects are nested too deeply to be a row") from error
            except json.JSONDecodeError as error:
                # What is cut by the end of what was read so far looks like what is wrong.
                if self._more():
                    continue
                cut = error.pos >= len(self._text) or error.msg.startswith("Unterminated")
                remedy = "the file ends in the middle of it: it is cut, write or copy it again" if cut else "repair it"
                raise UserError(f"{place} is no JSON ({error.msg}); {remedy}") from error
            self.position = end
            return found

    def _more(self) -> bool:
        """Read as much again as is held, so that the cost of a long row stays linear. False at the end."""
        if self._ended:
            return False
        self._text, self.position = self._text[self.position :], 0
        raw = self._stream.read(max(_CHUNK, len(self._text)))
        self._ended = not raw
        try:
            self._text += self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            found = error.object[error.start]
            raise UserError(f"{self._place()}: a byte (0x{found:02x}) is not UTF-8; {_ENCODING_REMEDY}") from error
        return not self._ended


def holds_whole_object(line: str) -> bool:
    """Return whether a file's first line begins with a whole object, so that others can follow it line by line."""
    try:
        return isinstance(_DECODER.raw_decode(line)[0], dict)
    except _RepeatedKeyError:
        return True
    except (ValueError, RecursionError):
        return False
