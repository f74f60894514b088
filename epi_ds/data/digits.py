"""Numbers that reach a chat template with their digits: JSON writes other ones for ``0.10``, ``1e5`` and ``1.00``.

A template may ask whether something is a number, and writes it by a filter that knows Python's numbers only. So it gets
an integer of many digits that stands for the literal, and the literal takes its place in what was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from epi_ds.data.reading.record import Number

# Digits that no data have, and as many behind them as there may be numbers.
_STEM, _WIDTH = "618033988749894848204586834365", 8
_HIDDEN = re.compile(rf"{_STEM}(\d{{{_WIDTH}}})")


class Digits:
    """The literals of one text that a template writes."""

    def __init__(self) -> None:
        self._literals: list[str] = []

    def hide(self, value: Any) -> Any:
        """Return a value with integers for the literals that `exact` left in it."""
        if isinstance(value, Number):
            self._literals.append(str(value))
            return int(f"{_STEM}{len(self._literals) - 1:0{_WIDTH}}")
        if isinstance(value, Mapping):
            return {key: self.hide(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(part) for part in value]
        return value

    def restore(self, written: str) -> str:
        """Return a text that the template wrote with the literals in it."""
        if not self._literals:
            return written
        return _HIDDEN.sub(lambda found: self._literals[int(found[1])], written)

    def lost_in(self, written: str, first: int) -> str | None:
        """Return one of the ``first`` literals that is missing in what a template wrote, before they are restored."""
        found = {int(number) for number in _HIDDEN.findall(written)} if first else set()
        return next((literal for index, literal in enumerate(self._literals[:first]) if index not in found), None)

    def __len__(self) -> int:
        return len(self._literals)
