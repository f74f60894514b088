"""Formats are found by their shape; what a row says comes through whole, or is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epi_ds.data.conversation import Conversation
from epi_ds.data.formats import Columns, Format, LeftOut
from epi_ds.data.table import Table, describe, files_matching
from epi_ds.errors import UserError
from tests.support.tables import read, read_with, write_lines
from tests.unit.test_reading import CODECS, CONTAINERS

QUESTION, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "share": 0.5}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def messages_of(row: dict[str, Any], folder: Path, **settings: Any) -> list[dict[str, Any]]:
    (found,) = read(write_lines(folder / "rows.jsonl", [row]), **settings)
    return [dict(message) for message in found.messages]


# --- every format, in every container ---

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True) -> list[dict[str, str]]:
    """Turns that alternate and end with the assistant."""
    turns = [{"role": "system", "content": draw(texts)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    return turns


def alpaca(turns: list[dict[str, str]]) -> dict[str, Any]:
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    pairs = [turn["content"] for turn in turns if turn["role"] != "system"]
    *history, question, answer = pairs
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "system": system,
        "history": [list(pair) for pair in zip(history[::2], history[1::2], strict=True)],
    }


WRITERS: dict[Format, Callable[[list[dict[str, str]]], dict[str, Any]]] = {
    Format.MESSAGES: lambda turns: {"messages": turns},
    Format.SHAREGPT: lambda turns: {
        "conversations": [{"from": SPEAKERS[turn["role"]], "value": turn["content"]} for turn in turns]
    },
    Format.PROMPT_COMPLETION: lambda turns: {"prompt": turns[:-1], "completion": turns[-1:]},
    Format.ALPACA: alpaca,
}
# Tables of texts keep lists as JSON.
FLAT = ("CSV", "TSV", "CSV with semicolons")


def write_table(path: Path, rows: list[dict[str, Any]], container: str, codec: str) -> Path:
    if container in FLAT:
        rows = [
            {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()} for row in rows
        ]
        # A table of one column has nothing that separates columns: only its name says what would, and no name says
        # semicolons.
        path = path.with_suffix(".tsv" if container == "TSV" else ".csv")
        if len(rows[0]) == 1 and container == "CSV with semicolons":
            container = "CSV"
    path.write_bytes(CODECS[codec](CONTAINERS[container](rows)))
    return path


containers, codecs = st.sampled_from(list(CONTAINERS)), st.sampled_from(list(CODECS))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(conversations(), min_size=1, max_size=5),
    form=st.sampled_from(list(WRITERS)),
    container=containers,
    codec=codecs,
)
def test_conversations_come_back_from_every_format_and_container(
    tmp_path_factory: Any, rows: Any, form: Format, container: str, codec: str
) -> None:
    written = [WRITERS[form](turns) for turns in rows]
    found, reading = read_with(write_table(tmp_path_factory.mktemp("rows") / "rows", written, container, codec))
    assert reading.format is not None
    assert reading.format.format is form
    assert [[dict(message) for message in row.messages] for row in found] == rows


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(conversations(system=False), min_size=1, max_size=4),
    pairs=st.lists(st.tuples(texts, texts), min_size=1),
    container=containers,
    codec=codecs,
)
def test_flat_formats_come_back(tmp_path_factory: Any, rows: Any, pairs: Any, container: str, codec: str) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows"

    def back(written: list[dict[str, Any]]) -> list[Conversation]:
        return read(write_table(path, written, container, codec))

    found = back([{"id": "x", "data": [turn["content"] for turn in turns]} for turns in rows])
    assert [[dict(message) for message in row.messages] for row in found] == rows
    for prompt, completion in (("prompt", "completion"), ("question", "answer")):
        found = back([dict(zip((prompt, completion), pair, strict=True)) for pair in pairs])
        assert [(row.messages[0]["content"], row.answer) for row in found] == pairs
    assert [row.text for row in back([{"text": text} for text, _ in pairs])] == [text for text, _ in pairs]
    options = [{"text": one, "question": two, "options": [two, one], "answer": 1} for one, two in pairs]
    assert [(row.messages[0]["content"], row.answer) for row in back(options)] == [
        (f"{one}\n\n{two}\n\nA. {two}\nB. {one}", "B") for one, two in pairs
    ]


def test_logiqa_is_a_question_with_lettered_options(tmp_path: Path) -> None:
    row = {
        "id": 4,
        "answer": 1,
        "text": "All cats sleep.",
        "question": "So?",
        "options": ["No", "Yes"],
        "type": {"x": True},
    }
    question, answer = messages_of(row, tmp_path)
    assert question["content"] == "All cats sleep.\n\nSo?\n\nA. No\n\nB. Yes".replace("No\n\n", "No\n")
    assert answer["content"] == "B"
    with pytest.raises(UserError, match=r"line 1: answer must be the position of one of the options, from 0, got 2"):
        messages_of({**row, "answer": 2}, tmp_path)


# --- texts as they are written ---


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("2", "2"),
        ("0.5", "0.5"),
        ("9007199254740993", "9007199254740993"),
        ("true", "true"),
        ('"007"', "007"),
        ('"2024-01-05"', "2024-01-05"),
        ('"2024-01-05 10:00:00"', "2024-01-05 10:00:00"),
        ('"a\\r\\nb"', "a\r\nb"),
        ('"a\\u0000b"', "a\0b"),
        ('"[1, 2]"', "[1, 2]"),
    ],
)
def test_answers_are_trained_as_they_are_written(tmp_path: Path, literal: str, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    # Among texts, and behind more rows than a format is found by.
    others = '{"question": "q", "answer": "ans \\"é\\"\\nline2"}\n' * 300
    path.write_text(f'{others}{{"question": "q", "answer": {literal}}}\n{others}')
    found = [row.answer for row in read(path)]
    assert found[300] == text
    assert set(found[:300] + found[301:]) == {'ans "é"\nline2'}


def test_a_key_that_appears_late_is_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "q", "answer": None}] * 200 + [
        {"question": "q", "answer": "a", "note": 1}
    ]
    found, reading = read_with(write_lines(tmp_path / "rows.jsonl", rows))
    assert [row.answer for row in found] == ["a"]
    assert reading.left_out_counts == {LeftOut.NO_ANSWER: 200}


# --- what stands beside content ---


def test_tools_calls_and_thoughts_come_through(tmp_path: Path) -> None:
    turns = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "add them"},
        {"role": "tool", "content": "2", "tool_call_id": "7", "name": "add"},
        {**ANSWER, "thinking": "so"},
    ]
    (found,) = read(write_lines(tmp_path / "rows.jsonl", [{"messages": turns, "tools": [TOOL], "system": "Be brief."}]))
    assert found.messages[0] == {"role": "system", "content": "Be brief."}
    assert found.messages[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
        "reasoning_content": "add them",
    }
    assert found.messages[3:] == (turns[2], turns[3])
    assert found.tools == (TOOL,)


def test_sharegpt_calls_functions(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": '{"x": 1, "share": 0.5}'}
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ]
    row = {"conversations": turns, "tools": json.dumps([TOOL["function"]])}
    (found,) = read(write_lines(tmp_path / "rows.jsonl", [row]))
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages[2] == {"role": "tool", "content": "2"}
    assert found.tools == (TOOL,)


def test_function_calls_as_openai_had_them_first_are_tool_calls(tmp_path: Path) -> None:
    turns = [
        {**QUESTION, "function_call": None},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"x": 1, "share": 0.5}'}},
        {"role": "function", "name": "add", "content": "2"},
        ANSWER,
    ]
    row = {"messages": turns, "functions": [TOOL["function"]], "function_call": "auto"}
    (found,) = read(write_lines(tmp_path / "rows.jsonl", [row]))
    assert found.messages[0] == QUESTION
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages[2] == {"role": "tool", "name": "add", "content": "2"}
    assert found.tools == (TOOL,)
    # A column of another meaning has its name alone in common.
    (plain,) = read(write_lines(tmp_path / "rows.jsonl", [{**row, "functions": "sine and cosine"}]))
    assert plain.tools == ()


@pytest.mark.parametrize(
    ("turn", "more", "said"),
    [
        (
            {**ANSWER, "function_call": {"name": "f"}, "tool_calls": [CALL]},
            {},
            "turn 2: it has tool_calls and function_call, which say the same in two ways",
        ),
        ({**QUESTION, "function_call": {"name": "f"}}, {}, "turn 2: function_call is the assistant's, and this is a"),
        ({**QUESTION, "tool_calls": [CALL]}, {}, "turn 2: tool_calls is the assistant's, and this is a turn of the"),
        ({**ANSWER, "function_call": {"arguments": "{}"}}, {}, "turn 2: a call of a function must have a name"),
        (
            {**ANSWER, "function_call": {"name": "f", "arguments": '{"x": 1'}},
            {},
            "turn 2: arguments of f are no JSON (Expecting ',' delimiter",
        ),
        (
            {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]},
            {},
            "arguments of f are no JSON (the key 'x' stands twice in one object)",
        ),
        (ANSWER, {"tools": [TOOL], "functions": [TOOL["function"]]}, "the columns tools and functions both say which"),
    ],
)
def test_calls_that_cannot_be_meant_are_named(tmp_path: Path, turn: Any, more: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        messages_of({"messages": [QUESTION, turn, ANSWER], **more}, tmp_path)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("", {}), (None, {}), ("{}", {}), ("ls -la", "ls -la"), ('{"x": [1, 0.5]}', {"x": [1, 0.5]})],
)
def test_arguments_are_objects_or_the_text_that_a_function_takes(tmp_path: Path, written: Any, expected: Any) -> None:
    call = {"function": {"name": "f", "arguments": written}}
    found = messages_of({"messages": [QUESTION, {**ANSWER, "tool_calls": [call]}]}, tmp_path)
    assert found[1]["tool_calls"][0]["function"]["arguments"] == expected


def test_turns_say_whether_they_are_learnt(tmp_path: Path) -> None:
    turns = [QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "train": True}]
    (found,) = read(write_lines(tmp_path / "rows.jsonl", [{"messages": turns}]))
    assert found.trained == (None, False, None, True)
    assert found.messages == (QUESTION, ANSWER, QUESTION, ANSWER)
    with pytest.raises(UserError, match=r"turn 2: weight must be 0 or 1"):
        read(write_lines(tmp_path / "rows.jsonl", [{"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}]))


def test_texts_in_parts_are_joined_and_pictures_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    assert messages_of({"messages": [{"role": "user", "content": parts}, ANSWER]}, tmp_path) == [QUESTION, ANSWER]
    with pytest.raises(UserError, match="turn 1: content of type image is not supported, only text is"):
        messages_of({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, tmp_path)
    with pytest.raises(UserError, match="it has a column images, and only text is trained on"):
        messages_of({"messages": [QUESTION, ANSWER], "images": ["x.png"]}, tmp_path)


# --- what is left out, and what is refused ---


def test_rows_that_say_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "q", "answer": "  "},
        {"question": "", "answer": "a"},
        {"question": "q"},
        {"question": "q", "answer": 0},
    ]
    found, reading = read_with(write_lines(tmp_path / "rows.jsonl", rows))
    assert [row.answer for row in found] == ["0"]
    assert reading.left_out_counts == {LeftOut.NO_ANSWER: 2, LeftOut.NO_QUESTION: 1}
    table = Table("rows", (tmp_path / "rows.jsonl",))
    told = [text for level, text in describe(table, reading) if level == logging.WARNING]
    assert any("left out 2 rows, because of no answer" in text and "(line 1, line 3)" in text for text in told)


def test_turns_that_no_answer_follows_are_cut_and_counted(tmp_path: Path) -> None:
    call, result = {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}
    thanks, silent = {"role": "user", "content": "thanks"}, {"role": "user", "content": ""}
    rows: list[Any] = [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, {**ANSWER, "weight": 1}, {**thanks, "weight": 0}]},
        {"messages": [QUESTION]},
        {"messages": [QUESTION, call, result, thanks, silent]},
        {"messages": [ANSWER, thanks]},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    found, reading = read_with(path)
    assert [row.messages for row in found] == [(QUESTION, ANSWER), (QUESTION, ANSWER), (QUESTION, call)]
    assert [row.trained for row in found] == [(), (None, True), ()]
    assert (reading.num_read, reading.num_cut) == (3, 2)
    assert reading.left_out_counts == {LeftOut.NO_ASSISTANT: 1, LeftOut.NO_QUESTION: 1}
    told = [text for level, text in describe(Table("rows", (path,)), reading) if level == logging.WARNING]
    assert any("2 rows go on behind what the assistant says last, and lose these" in text for text in told)
    assert any("(line 2, line 4)" in text for text in told)
    (odd,) = read(write_lines(path, [{"data": ["1+1?", "2", "thanks"]}]))
    assert odd.messages == (QUESTION, ANSWER)
    (pair,) = read(write_lines(path, [{"prompt": [QUESTION], "completion": [ANSWER, thanks]}]))
    assert pair.messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"train": [{"question": "q", "answer": "a"}]}, "of which train holds rows itself; write that list alone"),
        ({"messages": [QUESTION]}, "has no row to train on (1 no turn of the assistant)"),
        ({"messages": [ANSWER, QUESTION]}, "has no row to train on (1 no question)"),
        (
            {"prompt": [QUESTION, ANSWER], "completion": [QUESTION]},
            "has no row to train on (1 no turn of the assistant)",
        ),
        (
            {"messages": [QUESTION, ANSWER, {**QUESTION, "weight": 1}]},
            "line 1: a turn of the user is to be learnt, because of its weight, and nothing of the assistant",
        ),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "has no row to train on (1 no answer)"),
        ({"messages": [QUESTION, {"content": "2"}]}, "of which no format is known"),
        ({"prompt": [QUESTION], "completion": [QUESTION, ANSWER]}, "begins with the prompt, so it is the whole"),
        ({"prompt": "a", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, "set messages: chosen"),
        ({"messages": [QUESTION, {"role": "asistant", "content": "2"}]}, "did you mean 'assistant'"),
        ({"messages": [QUESTION, {"role": "assistant", "content": {"a": 1}}]}, "turn 2: content must be a text or a"),
        ({"messages": [QUESTION, ANSWER], "prompt": "a", "completion": "b"}, "format: messages (messages), or format:"),
        ({"prompt": "q", "completion": ["a", "b"]}, "completion, turn 1 must have role and content"),
        ({"prompt": {"text": "a"}, "completion": "b"}, "prompt, turn 1 must have role and content"),
        (
            {"system": "s", "messages": [{"role": "system", "content": "t"}, QUESTION, ANSWER]},
            "both say what the system",
        ),
        ({"question": "q", "answer": "\ud83d"}, "line 1: answer holds half of a character at position 1 (\\ud83d"),
        ({"q": "one word", "id": "7", "a": "two words"}, "for example prompt: q, completion: a"),
        ({"id": 7, "context": "x"}, "of which no format is known; name the ones to use, as prompt: <column>"),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {},
            },
            "to train on the answers that were preferred, set prompt: conversations, completion: chosen",
        ),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as raised:
        read(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_preferred_answers_can_be_trained_on(tmp_path: Path) -> None:
    chosen = {"from": "gpt", "value": "a"}
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": chosen, "rejected": chosen}
    columns = Columns(prompt=("conversations",), completion="chosen")
    assert messages_of(row, tmp_path, columns=columns)[1] == {"role": "assistant", "content": "a"}


def test_a_format_that_is_given_settles_it(tmp_path: Path) -> None:
    row = {"messages": [QUESTION, ANSWER], "prompt": "a", "completion": "b"}
    assert messages_of(row, tmp_path, format=Format.MESSAGES) == [QUESTION, ANSWER]
    assert messages_of(row, tmp_path, format=Format.PROMPT_COMPLETION)[1]["content"] == "b"
    with pytest.raises(UserError, match="which are not those of format: alpaca"):
        messages_of(row, tmp_path, format=Format.ALPACA)


def test_columns_are_named_by_hand(tmp_path: Path) -> None:
    row = {"question": "2+2?", "hint": "add", "empty": "", "answer": 4}
    columns = Columns(prompt=("question", "empty", "hint"), completion="answer")
    assert [m["content"] for m in messages_of(row, tmp_path, columns=columns)] == ["2+2?\n\nadd", "4"]
    assert messages_of({"talk": [QUESTION, ANSWER]}, tmp_path, columns=Columns(messages="talk")) == [QUESTION, ANSWER]
    with pytest.raises(UserError, match="has no column q; there are question, hint, empty, answer"):
        messages_of(row, tmp_path, columns=Columns(prompt=("q",), completion="answer"))


# --- which rows ---

NUMBERS = [
    {"question": f"{number}?", "answer": number, "good": number % 2 == 0, "kind": "ab"[number % 2]}
    for number in range(10)
]


def answers(found: list[Conversation]) -> list[int]:
    return [int(row.answer) for row in found]


@pytest.mark.parametrize("container", ["JSON lines", "Parquet", "CSV"])
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"kind": "b"}, [1, 3, 5, 7, 9]),
        ({"answer": 3}, [3]),
        ({"answer": [3, 4, 17]}, [3, 4]),
        ({"kind": ["a", "b"], "answer": 8}, [8]),
    ],
)
def test_where_takes_rows_by_value(tmp_path: Path, container: str, where: Any, expected: list[int]) -> None:
    path = tmp_path / "rows"
    path.write_bytes(CONTAINERS[container](NUMBERS))
    found, reading = read_with(path, where=where)
    assert answers(found) == expected
    assert reading.left_out_counts == {LeftOut.FILTERED: 10 - len(expected)}


def test_where_knows_true_from_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows", [*NUMBERS, {"question": "1?", "answer": 1, "good": 1}])
    assert answers(read(path, where={"good": True})) == [0, 2, 4, 6, 8]
    with pytest.raises(UserError, match=r"where: .* has no column gud; there are answer, good, kind, question"):
        read(path, where={"gud": True})
    with pytest.raises(UserError, match=r"has no row to train on \(10 where says so\)"):
        read(write_lines(tmp_path / "rows", NUMBERS), where={"kind": "c"})


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", list(range(10))),
        ("train[:3]", [0, 1, 2]),
        ("train[-3:]", [7, 8, 9]),
        ("train[20%:50%]", [2, 3, 4]),
        ("train[8:]+train[:2]", [8, 9, 0, 1]),
    ],
)
def test_a_split_is_a_part_of_all_files(tmp_path: Path, split: str, expected: list[int]) -> None:
    files = [write_lines(tmp_path / f"{first}.jsonl", NUMBERS[first : first + 4]) for first in (0, 4, 8)]
    assert answers(read(*files, split=split)) == expected
    assert answers(read(*files, split=split, limit=2)) == expected[:2]
    with pytest.raises(UserError, match=r"parts of a split are written train\[:100\]"):
        read(*files, split="train[a:]")


def test_a_glob_lists_what_it_matched(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "c.txt"):
        write_lines(tmp_path / name, NUMBERS[:1])
    (tmp_path / "folder.jsonl").mkdir()
    found = files_matching(str(tmp_path / "*.jsonl"))
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl"]
    _, reading = read_with(*found)
    (_, told), *_ = describe(Table("glob", found), reading)
    assert "2 files: " in told
    assert all(str(path) in told for path in found)
    with pytest.raises(UserError, match="no file matches"):
        files_matching(str(tmp_path / "*.parquet"))


def test_columns_that_tell_something_are_named(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, ANSWER], "label": True, "source": "x"}]
    _, reading = read_with(write_lines(tmp_path / "rows", rows))
    told = dict(describe(Table("rows", (tmp_path / "rows",)), reading))
    assert "the columns label are not read" in told[logging.WARNING]
    assert "where: {label: true}" in told[logging.WARNING]
    assert "not read are the columns source" in told[logging.INFO]


def test_weights_hold_in_prompts_and_completions(tmp_path: Path) -> None:
    row = {"prompt": [QUESTION, {**ANSWER, "weight": 1}, QUESTION], "completion": [{**ANSWER, "weight": 0}]}
    (found,) = read(write_lines(tmp_path / "rows", [row]))
    assert found.trained == (None, True, None, False)


@pytest.mark.parametrize("answer", ['{"name": "Bob"}', "[1, 2]", '[{"a": 1}]'])
def test_json_in_a_table_of_texts_is_a_text(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(CONTAINERS["CSV"]([{"": "0", "question": "q", "answer": answer}]))
    assert [row.answer for row in read(path)] == [answer]


def test_nan_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('{"instruction": "Say hi", "input": NaN, "output": "hi"}\n{"instruction": "x", "output": NaN}\n')
    found, reading = read_with(path)
    assert [row.messages[0]["content"] for row in found] == ["Say hi"]
    assert reading.left_out_counts == {LeftOut.NO_ANSWER: 1}


def test_a_turn_without_content_is_counted_in_every_container(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, {"role": "assistant", "content": None}]}]
    for container in ("JSON lines", "Parquet", "Arrow file"):
        path = tmp_path / "rows"
        path.write_bytes(CONTAINERS[container](rows))
        found, reading = read_with(path)
        assert len(found) == 1
        assert reading.left_out_counts == {LeftOut.NO_ANSWER: 1}


def test_rows_of_another_form_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    pairs: list[dict[str, Any]] = [{"question": "q", "answer": "a"}] * 150
    chats = [{"messages": [QUESTION, ANSWER]}]
    one = write_lines(tmp_path / "one.jsonl", [*pairs, *chats])
    with pytest.raises(UserError, match=r"one\.jsonl, line 151: it has the columns messages, and none of"):
        read(one)
    first, second = write_lines(tmp_path / "a.jsonl", pairs), write_lines(tmp_path / "b.jsonl", chats)
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: it has the columns messages"):
        read(first, second)
    late = write_lines(tmp_path / "late.jsonl", [*pairs, {**pairs[0], "image": "x.png"}])
    with pytest.raises(UserError, match=r"late\.jsonl, line 151: it has a column image"):
        read(late)


@pytest.mark.parametrize("speaker", ["User", "prompter", "human"])
@pytest.mark.parametrize("answerer", ["Assistant", "ai", "gpt"])
def test_speakers_are_known_by_many_names(tmp_path: Path, speaker: str, answerer: str) -> None:
    turns = [{"role": speaker, "content": "1+1?"}, {"role": answerer, "content": "2"}]
    assert messages_of({"messages": turns}, tmp_path) == [QUESTION, ANSWER]
