"""Files are read as they were written, or refused by name, row and remedy."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epi_ds.data.reading.containers import open_rows
from epi_ds.data.reading.record import Number, plain
from epi_ds.errors import UserError

ROWS: list[dict[str, Any]] = [{"question": "q", "answer": "a"}, {"question": "Größe?", "answer": 'line\n"two"'}]


def cells_of(path: Path) -> list[dict[str, Any]]:
    with open_rows(path) as rows:
        return [dict(record.cells) for record in rows.records]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_list(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def separated(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def arrow(rows: list[dict[str, Any]], *, stream: bool) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "JSON lines": lines,
    "JSON list": json_list,
    "CSV": separated,
    "TSV": lambda rows: separated(rows, "\t"),
    "CSV with semicolons": lambda rows: separated(rows, ";"),
    "Parquet": parquet,
    "Arrow stream": lambda rows: arrow(rows, stream=True),
    "Arrow file": lambda rows: arrow(rows, stream=False),
}
CODECS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    # Without the time of day, which the workers of xdist do not share.
    "gzip": lambda raw: gzip.compress(raw, mtime=0),
    "zstd": lambda raw: bytes(pyarrow.compress(raw, codec="zstd", asbytes=True)),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["rows.txt", "ROWS.JSONL", "rows.parquet", "rows[1].data"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, container: str, codec: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(CODECS[codec](CONTAINERS[container](ROWS)))
    # A pattern would have matched this one.
    (tmp_path / "rows1.data").write_bytes(lines([{"question": "no", "answer": "no"}]))
    assert cells_of(path) == ROWS


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
cells = st.one_of(
    texts, st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.lists(texts, max_size=3)
)
tables = st.lists(st.dictionaries(texts, cells, max_size=4), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(rows=tables, indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_json_comes_back_to_the_byte(tmp_path_factory: Any, rows: Any, indent: int | None, ascii_only: bool) -> None:
    folder = tmp_path_factory.mktemp("json")
    as_list, as_lines = folder / "list", folder / "lines"
    as_list.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", newline="")
    as_lines.write_bytes(b"".join(json.dumps(row, ensure_ascii=ascii_only).encode() + b"\r\n\n" for row in rows))
    for path in (as_list, as_lines):
        found = cells_of(path)
        assert [plain(row) for row in found] == rows
        assert all(type(one) is str for row in found for one in row.values() if isinstance(one, str) and one in rows)


@pytest.mark.parametrize("literal", ["2", "0.5", "9007199254740993", "1180591620717411303424", "1e400", "-0.10", "NaN"])
@pytest.mark.parametrize("form", ['{{"a": {}}}\n', '[{{"a": {}}}]'])
def test_numbers_keep_their_digits(tmp_path: Path, literal: str, form: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(form.format(literal))
    (row,) = cells_of(path)
    assert isinstance(row["a"], Number)
    assert str(row["a"]) == literal


def test_a_list_is_read_across_the_borders_of_chunks(tmp_path: Path) -> None:
    """Rows longer than what is read at once, characters of several bytes on every border."""
    rows = [{"text": "é€𝄞" * (400_000 + number), "n": number} for number in range(5)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [plain(row) for row in cells_of(path)] == rows


def test_many_rows_are_not_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{"answer": 7 if number == 900 else 'ans "é"\nline2'} for number in range(1000)]))
    with open_rows(path) as rows:
        assert next(rows.records).cells == {"answer": 'ans "é"\nline2'}
        assert [record.number for record in rows.records if record.cells["answer"] == "7"] == [901]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b'{"a": 1},\n{"a": 2},\n', "line 1 is no JSON (Extra data, column 9); remove the comma at its end"),
        (b'{"a": 1}{"a": 2}\n', "line 1 is no JSON (Extra data, column 9); two rows stand on it"),
        (b'{"a": 1}\n{"a": "x', "line 2 is no JSON (Unterminated string starting at, column 7); the file ends in the"),
        (b'{"a": 1}\n{"a" 2}\n{"a": 3}\n', "line 2 is no JSON (Expecting ':' delimiter, column 6); a line must be one"),
        (b'{"a": 1, "a": 2}\n', "line 1: the key 'a' stands twice in one object; leave one of them"),
        (b'[{"a": 1}, {"a": 1, "b": {"c": 1, "c": 2}}]', "row 2: the key 'c' stands twice"),
        (b'[{"a": 1}, {"a": "x', "row 2 is no JSON (Unterminated string starting at); the file ends in the middle"),
        (b'[{"a": 1} {"a": 2}]', "row 1: behind a row a comma or the list's end must come, not '{'"),
        (b'[{"a": 1}', "row 1: behind a row a comma or the list's end must come, not 'the end'"),
        (b'[{"a": 1}] [', "row 1: behind the end of the list stands '['"),
        (b"[1, 2]", "row 1: a row must be an object with named columns, not '1'"),
        (b'{"a": 1}\n7\n', "line 2: a row must be an object with named columns, not '7'"),
        ('{"a": "ö"}\n'.encode("latin1"), "line 1: byte 8 (0xf6) is not UTF-8; save it as UTF-8"),
        ('[{"a": "ö"}]'.encode("latin1"), "row 1: a byte (0xf6) is not UTF-8"),
        ('{"a": "ö"}\n'.encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b"a,b\n1,2\n3\n", "line 3: the row has 1 cells, the header 2"),
        (b"a,a\n1,2\n", "line 1: the column name 'a' stands twice"),
        ("a,b\n1,ö\n".encode("latin1"), "is not UTF-8"),
        (b'a,b\n1,"2\n', "unexpected end of data"),
        (b"hello\nworld\n", "holds no rows that can be read: it begins with 'hello'"),
        (b"PK\x03\x04\x00", "is an archive"),
        (b"BZh91", "is compressed by bzip2"),
        (b"PAR1 and then nothing", "the file is cut or damaged"),
        (b"ARROW1 and then nothing", "the file is cut or damaged"),
        (CODECS["gzip"](lines(ROWS))[:-12], "is cut or damaged: its gzip data"),
        (CODECS["zstd"](lines(ROWS) * 100)[:-12], "is cut or damaged: its zstd data"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw)
    with pytest.raises(UserError) as raised:
        cells_of(path)
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; name its files with glob"):
        cells_of(tmp_path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        cells_of(tmp_path / "no.jsonl")


def test_one_object_may_take_many_lines_and_a_list_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert cells_of(path) == ROWS[:1]
    path.write_text("[ ]")
    assert cells_of(path) == []
