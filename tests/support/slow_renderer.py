"""What is to be trained of a conversation, by jinja and a regular expression: nothing of it is epi_ds's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Marks(NamedTuple):
    """What a template writes around an answer, as its model's documentation has it."""

    asks: str
    ends: str


def render(template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, Any]) -> str:
    """Return what a template writes. Raises ValueError where it refuses the messages."""

    def refuse(reason: str) -> None:
        raise ValueError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(
        messages=[dict(one) for one in messages], add_generation_prompt=False, **names
    )


def answers_in(written: str, marks: Marks) -> list[tuple[int, int]]:
    """Return the characters of what the assistant says, with the ends of its turns; what ends a text is the last's."""
    pattern = f"{re.escape(marks.asks)}(.*?{re.escape(marks.ends)})"
    found = [match.span(1) for match in re.finditer(pattern, written, re.DOTALL)]
    return [*found[:-1], (found[-1][0], len(written))]


def labelled(tokenizer: Any, written: str, learnt: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return tokens and labels of a text of ASCII: the tokens of learnt characters, and -100 for all others."""
    ids = tokenizer.encode(written, add_special_tokens=False)
    labels, begin = [], 0
    for token in ids:
        end = begin + len(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        labels.append(token if any(begin < stop and end > start for start, stop in learnt) else -100)
        begin = end
    assert begin == len(written)
    return ids, labels
