"""Cells of Arrow's columns are texts as they were written, whatever type a column has and however deep it lies."""

from __future__ import annotations

import datetime
import decimal
import struct
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epi_ds.data.cells import text_of
from epi_ds.data.reading.arrow_values import values_of
from epi_ds.data.reading.containers import open_rows
from epi_ds.errors import UserError

NARROW = {"float32": pyarrow.float32(), "float16": pyarrow.float16()}


def narrow(values: list[float | None], kind: str) -> pyarrow.Array:
    mask = numpy.array([value is None for value in values])
    filled = numpy.array([0 if value is None else value for value in values], kind)
    return pyarrow.array(filled, NARROW[kind], mask=mask)


def cells_of(path: Path, table: pyarrow.Table) -> list[dict[str, Any]]:
    pyarrow.parquet.write_table(table, path)
    with open_rows(path) as rows:
        return [dict(record.cells) for record in rows.records]


@pytest.mark.parametrize("kind", NARROW)
def test_a_narrow_number_is_the_one_that_was_written(kind: str) -> None:
    array = narrow([0.1, None, -2.5, 3, 0.333], kind)
    assert [text_of(cell, "x") for cell in values_of(array)] == ["0.1", "", "-2.5", "3.0", "0.333"]
    lists = pyarrow.list_(pyarrow.large_list(NARROW[kind]))
    deep = pyarrow.array([{"x": [[0.1], None]}, None, {"x": None}], pyarrow.struct([("x", lists)]))
    assert values_of(deep) == [{"x": [[0.1], None]}, None, {}]
    assert values_of(deep.slice(1)) == [None, {}]


@given(st.floats(width=32, allow_nan=False))
def test_the_shortest_decimal_reads_back(value: float) -> None:
    (found,) = values_of(narrow([value], "float32"))
    assert struct.pack("f", found) == struct.pack("f", value)
    for digits in range(1, 10):
        if struct.pack("f", float(f"{value:.{digits}g}")) == struct.pack("f", value):
            assert float(f"{found:.{digits}g}") == found
            break


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (pyarrow.array([decimal.Decimal("0.10"), None], pyarrow.decimal128(9, 2)), ["0.10", ""]),
        (pyarrow.array([decimal.Decimal("0.0000000001")], pyarrow.decimal128(20, 10)), ["0.0000000001"]),
        (pyarrow.array([decimal.Decimal("1500")], pyarrow.decimal128(9, -2)), ["1500"]),
        (pyarrow.array([decimal.Decimal("9007199254740993.5")], pyarrow.decimal256(40, 1)), ["9007199254740993.5"]),
        (pyarrow.array([datetime.date(2024, 1, 5)]), ["2024-01-05"]),
        (pyarrow.array([datetime.datetime(2024, 1, 5, 10)], pyarrow.timestamp("us")), ["2024-01-05T10:00:00"]),
        (pyarrow.array([1], pyarrow.timestamp("ns")), ["1970-01-01T00:00:00.000000001"]),
        (pyarrow.array([0], pyarrow.timestamp("s", "UTC")), ["1970-01-01T00:00:00+00:00"]),
        (pyarrow.array([1], pyarrow.time64("ns")), ["00:00:00.000000001"]),
        (pyarrow.array([datetime.time(10, 30)]), ["10:30:00"]),
        (pyarrow.array([2**63 - 1]), ["9223372036854775807"]),
        (pyarrow.array([0.1, 1e22]), ["0.1", "1e+22"]),
        (narrow([0.1, 0.1], "float32").dictionary_encode(), ["0.1", "0.1"]),
        (pyarrow.RunEndEncodedArray.from_arrays([2], narrow([0.1], "float32")), ["0.1", "0.1"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pyarrow.Array) else "",
)
def test_numbers_and_times_keep_their_digits(array: pyarrow.Array, texts: list[str]) -> None:
    assert [text_of(cell, "x") for cell in values_of(array)] == texts


def test_a_map_is_an_object_and_lists_keep_their_rows() -> None:
    pairs = pyarrow.array([[("a", 0.1)], None, [("b", None)], []], pyarrow.map_(pyarrow.string(), pyarrow.float32()))
    assert values_of(pairs) == [{"a": 0.1}, None, {"b": None}, {}]
    assert values_of(pairs.slice(2)) == [{"b": None}, {}]
    fixed = pyarrow.array([[1.5, 2.5], None, [0.1, 0.2]], pyarrow.list_(pyarrow.float32(), 2))
    assert values_of(fixed.slice(1)) == [None, [0.1, 0.2]]


texts = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=5))


@given(
    st.lists(st.fixed_dictionaries({"a": texts, "b": st.none() | st.lists(st.none() | st.integers(0, 9), max_size=3)}))
)
def test_what_needs_no_care_is_what_arrow_says(rows: list[dict[str, Any]]) -> None:
    kind = pyarrow.struct([("a", pyarrow.string()), ("b", pyarrow.list_(pyarrow.int64()))])
    expected = [{name: cell for name, cell in row.items() if cell is not None} for row in rows]
    array = pyarrow.array(rows, kind)
    assert values_of(array) == expected
    assert values_of(array.slice(1)) == expected[1:]


def test_rows_of_a_file_have_them(tmp_path: Path) -> None:
    table = pyarrow.table({"score": narrow([0.1, None], "float32"), "name": ["a", None]})
    assert cells_of(tmp_path / "rows", table) == [{"score": 0.1, "name": "a"}, {"score": None, "name": None}]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            pyarrow.table({"x": pyarrow.array([10**12], pyarrow.timestamp("s"))}),
            r"row 1 or soon after: the column x \(timestamp\[.*s\]\) holds what cannot be read",
        ),
        (pyarrow.table([["a"], ["b"]], names=["x", "x"]), "row 1: the column name 'x' stands twice; give each its own"),
    ],
)
def test_what_cannot_be_read_names_its_column(tmp_path: Path, table: pyarrow.Table, said: str) -> None:
    with pytest.raises(UserError, match=said):
        cells_of(tmp_path / "rows", table)
