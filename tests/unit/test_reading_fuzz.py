"""Whatever a file holds, reading it ends in conversations or in one line that names the file: never in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epi_ds.errors import UserError
from tests.support.tables import read
from tests.unit.test_reading import CODECS, CONTAINERS

CALL = {"function": {"name": "f", "arguments": '{"x": 0.10}'}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Größe"},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "2", "weight": 1},
            ],
            "tools": [{"name": "f", "parameters": {"type": "object"}}],
            "score": 0.5,
        }
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}],
    "ultrachat": [{"data": ["q", "a", "r", "b"]}],
    "alpaca": [{"instruction": "Add.", "input": "1+1", "output": "2", "history": [["q", "a"]]}],
    "prompt_completion": [{"prompt": "q", "completion": 'line\n"two"'}],
    "question_answer": [{"question": "q", "answer": 7}],
    "logiqa": [{"text": "t", "question": "q", "options": ["a", "b"], "answer": 1}],
    "text": [{"text": "a document"}],
}
FLAT = ("CSV", "TSV", "CSV with semicolons")
# What files are made of, so that what is wrong is wrong inside: quotes, brackets, literals, keys, halves of characters.
PIECES = [
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\n",
        b"\r",
        b"\t",
        b";",
        b"\x00",
        b"\xff",
        b"\xc3",
        b"\xef\xbb\xbf",
    ),
    *(b"null", b"true", b"NaN", b"1e999", b"-", b'"role"', b'"from"', b'"content"', b'"messages"', b'"\\ud800"', b"{}"),
    *(b"\x1f\x8b", b"PAR1", b"ARROW1\x00\x00", b"\xff\xff\xff\xff", b"[" * 3000, b'{"a":' * 3000),
]


def written(form: str, container: str) -> bytes:
    rows = ROWS[form] * 3
    if container in FLAT:
        rows = [
            {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()} for row in rows
        ]
    return CONTAINERS[container](rows)


def ends_in_rows_or_one_line(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        read(path)
    except UserError as error:
        said = str(error)
    else:
        return
    assert said.startswith(str(path))
    assert "\n" not in said


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of any format, container and codec with a few damages, before it is compressed or after."""
    container, codec = draw(st.sampled_from(list(CONTAINERS))), CODECS[draw(st.sampled_from(list(CODECS)))]
    raw = written(draw(st.sampled_from(list(ROWS))), container)
    inside = draw(st.booleans())
    raw = bytes(raw if inside else codec(raw))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        length = draw(st.integers(0, 8))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=4)))
        raw = draw(
            st.sampled_from(
                [
                    raw[:at] + piece + raw[at + len(piece) :],
                    raw[:at] + piece + raw[at:],
                    raw[:at] + raw[at + length :],
                    raw[:at] + raw[at : at + 40] + raw[at:],
                    raw[: max(at, 1)],
                ]
            )
        )
    return codec(raw) if inside else raw


ANY = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(PIECES[:-2]) | st.binary(max_size=3), max_size=20).map(b"".join),
    st.text(max_size=100).map(lambda text: f'{{"a": {text}'.encode("utf-8", "replace")),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "role", "content", "from", "value", "tool_calls", "function", "data", "text"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


def fuzz(folder: Path, files: st.SearchStrategy[bytes], examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(files)
    def test(raw: bytes) -> None:
        ends_in_rows_or_one_line(folder / "rows", raw)

    run: Callable[[], None] = test
    run()


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_what_is_damaged_can_be_read_before(tmp_path: Path, form: str, container: str) -> None:
    """Else the damages would show nothing."""
    # Where a table has one column, only the name of its file says that it is one.
    path = tmp_path / ("rows.csv" if container in FLAT else "rows")
    path.write_bytes(written(form, container))
    assert len(read(path)) == 3


@pytest.mark.parametrize("kind", ["any bytes", "damaged files"])
def test_no_file_ends_in_a_traceback(tmp_path: Path, kind: str) -> None:
    fuzz(tmp_path, ANY if kind == "any bytes" else damaged(), 70)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any bytes", "damaged files"])
def test_none_of_many_files_ends_in_a_traceback(tmp_path: Path, kind: str) -> None:
    fuzz(tmp_path, ANY if kind == "any bytes" else damaged(), 600)
