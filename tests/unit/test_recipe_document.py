"""A recipe's file knows the line of every key, and what was set on the command line instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from epi_ds.errors import UserError
from epi_ds.recipe.document import read_document, without


def test_lines_are_those_of_nested_keys_lists_and_keys_with_dots(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a:\n  b: 1\n  c.d: {e: 2}\nlist:\n  - x: 1\n    y:\n      - 3\n      - z: 4\n  - q\n")
    document = read_document(path, ["list.0.y.1.z=5", "new.key=1"], keys=[])
    lines = {"": 1, "a": 1, "a.b": 2, "a.c.d": 3, "a.c.d.e": 3, "a.c.x": 1, "list.0": 5, "list.0.y": 6, "list.1": 9}
    assert {key: document.line_of(key) for key in lines} == lines
    assert document.place_of("list.0.y.1.z") == "override list.0.y.1.z=5"
    assert document.place_of("list.0.y.1") == "line 8"
    assert document.place_of("new.key.deeper") == "override new.key=1"


def test_a_repeated_key_and_what_is_no_yaml_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: {b: 1}\nc:\n  d: 1\n  e: 2\n  d: 3\n")
    document = read_document(path, [], keys=[])
    assert [(one.key, document.line_of(one.key)) for one in document.repeated_keys()] == [("c.d", 5)]
    path.write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(UserError, match=r"r.yaml, line 3: no YAML: "):
        read_document(path, [], keys=[])


def test_a_value_is_left_out_without_moving_others() -> None:
    values = {"a": [{"b": 1, "c.d": {"e": 2, "f": 3}}], "g": 4}
    assert without(values, "a.0.c.d.e") == {"a": [{"b": 1, "c.d": {"f": 3}}], "g": 4}
    assert without(values, "a.0.b.deeper") == {"a": [{"c.d": {"e": 2, "f": 3}}], "g": 4}
    assert without(values, "g") == {"a": values["a"]}
    assert without(values, "a.0") is without(values, "a.0.missing") is without(values, "") is None
