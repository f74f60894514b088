"""What is to be told of rows that are trained on, counted: nobody reads a line for each of a hundred thousand rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple


class RemarkKind(StrEnum):
    """What there is to tell, with what to do about it."""

    SPECIAL_TOKEN = (
        "{rows} rows write the special token {detail} in what they say, which the tokenizer takes for its own and not "
        "for a text (first {place}); write it otherwise where it is meant as a text"
    )
    UNTOLD_TURN = (
        "{times} turns in {rows} rows are not learnt, because the chat template does not let us tell where they stand "
        "(first {place}); mark what the assistant says by {{% generation %}} in it, or give these turns as rows of "
        "their own"
    )
    UNWRITTEN_THOUGHT = (
        "{times} turns in {rows} rows are learnt without their thoughts, which the chat template writes in the last "
        "turns alone (first {place}); give the conversation up to such a turn as a row of its own to learn them"
    )
    UNKNOWN_KEY = (
        "{rows} rows have turns with {detail}, which the chat template does not write (first {place}); remove the key, "
        "or set train.chat_template_path to one that does"
    )


class Remark(NamedTuple):
    """What is to be told of one row."""

    kind: RemarkKind
    detail: str = ""
    """What of this kind is counted apart."""
    times: int = 1


class Remarks:
    """Counts remarks, and keeps the place of the first of each."""

    def __init__(self) -> None:
        self._first: dict[tuple[RemarkKind, str], str] = {}
        self._rows: dict[tuple[RemarkKind, str], int] = {}
        self._times: dict[tuple[RemarkKind, str], int] = {}

    def add(self, place: str, remarks: tuple[Remark, ...]) -> None:
        """Count what is to be told of a row."""
        for kind, detail, times in remarks:
            key = (kind, detail)
            self._first.setdefault(key, place)
            self._rows[key] = self._rows.get(key, 0) + 1
            self._times[key] = self._times.get(key, 0) + times

    def told(self, name: str) -> Iterator[tuple[int, str]]:
        """Yield what to log of the rows of a source, each with its level."""
        for (kind, detail), rows in self._rows.items():
            key = (kind, detail)
            text = kind.format(rows=rows, times=self._times[key], detail=detail, place=self._first[key])
            yield logging.WARNING, f"{name}: {text}"
