from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epi_ds.data.conversations import Columns
from epi_ds.data.scoring import exact_match, final_number, same_final_number
from epi_ds.data.sources import skill_conversations, table_conversations

ROWS = [
    {"question": "1+1?", "hint": "", "answer": "It is 2\n#### 2"},
    {"question": "2+2?", "hint": "add", "answer": "#### 4"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_columns_are_mapped_by_name(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    read = table_conversations(path, Columns(prompt=("question", "hint"), completion="answer"))
    assert [[m["role"] for m in messages] for messages in read] == [["user", "assistant"]] * 2
    assert [messages[0]["content"] for messages in read] == ["1+1?", "2+2?\n\nadd"]
    assert read[0][1]["content"] == "It is 2\n#### 2"
    assert len(table_conversations(path, Columns(prompt=("question",), completion="answer"), limit=1)) == 1


def test_messages_are_found_without_being_named(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write_rows(tmp_path / "rows.json", [{"messages": messages}])
    assert table_conversations(path, Columns()) == [messages]
    path = write_rows(tmp_path / "named.json", [{"talk": messages}])
    assert table_conversations(path, Columns(messages="talk")) == [messages]


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    completion = [{"role": "assistant", "content": "hello"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": completion}])
    assert table_conversations(path, Columns()) == [prompt + completion]


def test_a_number_is_an_answer_and_an_empty_one_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "1-1", "completion": 0}, {"prompt": "", "completion": 3}, {"prompt": "1+1", "completion": 2}]
    path = write_rows(tmp_path / "rows.json", rows)
    answers = [messages[1]["content"] for messages in table_conversations(path, Columns())]
    assert answers == ["0", "2"]
    assert "left out 1 rows without a question or an answer (rows 1)" in caplog.text
    # The limit is of rows that can be used.
    assert len(table_conversations(path, Columns(), limit=2)) == 2


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, Columns(), "has the columns question, hint, answer: name the ones to use"),
        (
            ROWS,
            Columns(prompt=("q",), completion="answer"),
            "has no column q; there are question, hint, answer",
        ),
        ([{"prompt": "a", "completion": ""}], Columns(), "no row with both a question and an answer"),
        ([{"prompt": {"text": "a"}, "completion": "b"}], Columns(), "row 0: expected a text, a number or a list"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": None, "tool_calls": ["f"]},
                    ]
                }
            ],
            Columns(),
            "row 0: tool calls are not supported",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            Columns(),
            "row 0: a conversation must have a prompt and end",
        ),
        (
            [{"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            Columns(),
            "role 'human' is none of",
        ),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_named(
    tmp_path: Path, rows: list[dict[str, Any]], columns: Columns, message: str
) -> None:
    with pytest.raises(ValueError, match=r"row|column") as raised:
        table_conversations(write_rows(tmp_path / "rows.json", rows), columns)
    assert message in str(raised.value)


def test_a_missing_file_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no data file"):
        table_conversations(str(tmp_path / "no.jsonl"), Columns())


def test_skills_end_with_the_assistant() -> None:
    for messages in skill_conversations("dialogue", split="train", size=5, seed=1):
        assert messages[-1]["role"] == "assistant"
        assert len(messages) > 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4\n#### 1,234", 1234),
        ("#### -2.5 dollars", -2.5),
        ("so 3 and 4\n#### 5 of 7", 5),
        ("first 3, then 12.", 12),
        ("none", None),
        ("####", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_answers_are_compared() -> None:
    assert same_final_number("I think 7, no, 8", "5+3\n#### 8")
    assert not same_final_number("I do not know", "#### 8")
    assert exact_match(" B\n", "B")
    assert not exact_match("b", "B")
