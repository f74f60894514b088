"""Special tokens that stand in what rows say: a tokenizer takes them for its own, and a turn ends inside its text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from epi_ds.data.conversation import Conversation
from epi_ds.data.remarks import Remark, RemarkKind


class SpecialTokens:
    """Those of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        names = {*map(str, tokenizer.all_special_tokens), *(str(token.content) for token in added if token.special)}
        # The longest first, of which others are a part.
        ordered = sorted(filter(None, names), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def remarks(self, row: Conversation) -> tuple[Remark, ...]:
        """Return a remark for every special token that is written in what a row says."""
        if self._pattern is None:
            return ()
        found = dict.fromkeys(
            token
            for text in (row.text, *map(_said, row.messages), row.tools)
            for one in _texts_in(text)
            for token in self._pattern.findall(one)
        )
        return tuple(Remark(RemarkKind.SPECIAL_TOKEN, token) for token in found)


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "role"}


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from (str(key), *_texts_in(part))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts_in(part)
