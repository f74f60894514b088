"""What is trained is what the template writes, and the loss is on what was asked for: for templates as shipped."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from epi_ds.data.conversation import Conversation, conversation_of
from epi_ds.data.reading.record import Number
from epi_ds.data.remarks import Remark, RemarkKind
from epi_ds.data.rendering import Encoded, Learnt, Renderer
from epi_ds.data.skills import load_tokenizer
from epi_ds.errors import UserError
from tests.support.tables import read

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes a turn without its thoughts once others follow, as reasoning models do.
STRIPS = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip() }}",
)
# Asks with an empty thought that no conversation has.
EMPTY_THOUGHT = CHATML.replace(
    "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif"
)
OWN = {"chatml": CHATML, "strips thoughts": STRIPS, "empty thought": EMPTY_THOUGHT}
# The originals, without marks of what the assistant says.
SHIPPED = [
    "llama3",
    "llama3_1",
    "qwen3",
    "qwen2_5",
    "qwen3_5_think",
    "gemma3",
    "phi3",
    "deepseekv3",
    "cohere2",
    "smolvlm2",
]
SHIPPED = [name for name in SHIPPED if (TEMPLATES / f"{name}.jinja").exists()]
NAMES = [*OWN, *SHIPPED]

ASKS = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6, of course."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def template_of(name: str) -> str:
    return OWN[name] if name in OWN else (TEMPLATES / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = load_tokenizer()
    marks = [
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|end|>",
    ]
    found.add_tokens(marks, special_tokens=True)
    found.bos_token = "<|begin_of_text|>"
    return found


def learnt_texts(tokenizer: Any, encoded: Encoded) -> list[str]:
    """What the loss is on, stretch by stretch."""
    pairs = zip(encoded.learnt, encoded.input_ids, strict=True)
    return [tokenizer.decode([token for _, token in run]) for learn, run in groupby(pairs, lambda one: one[0]) if learn]


def slow_last_turn(tokenizer: Any, template: str, row: Conversation) -> Encoded:
    """By transformers alone, token by token."""
    prompt, whole = (
        tokenizer.apply_chat_template(
            [dict(one) for one in messages], chat_template=template, add_generation_prompt=asks, return_dict=False
        )
        for messages, asks in ((row.prompt, True), (row.messages, False))
    )
    learnt, same = [], True
    for index, token in enumerate(whole):
        same = same and index < len(prompt) and prompt[index] == token
        learnt.append(not same)
    return Encoded(whole, learnt)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_turn_begins_where_the_prompt_ends(name: str, tokenizer: Any) -> None:
    template = template_of(name)
    renderer = Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=template)
    for messages in (ASKS, ASKS[:2], [*ASKS[:2], *ASKS]):
        row = conversation_of(messages)
        encoded = renderer.encode(row)
        assert encoded == slow_last_turn(tokenizer, template, row)
        (said,) = learnt_texts(tokenizer, encoded)
        assert str(messages[-1]["content"]) in said
        assert "user" not in said


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_learnt_with_its_end_and_nothing_else(name: str, tokenizer: Any) -> None:
    template = template_of(name)
    renderer = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=template)
    encoded = renderer.encode(conversation_of(ASKS))
    said = learnt_texts(tokenizer, encoded)
    assert len(said) == 2
    for text, turn in zip(said, ASKS[1::2], strict=True):
        assert turn["content"] in text
    last = Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=template).encode(conversation_of(ASKS))
    assert said[1] == learnt_texts(tokenizer, last)[0]
    # Where a template is the same for every turn, so is the end.
    assert said[0].rpartition("It is 4.")[2] in said[1]
    assert encoded.input_ids == last.input_ids


# Of the others TRL's version writes other texts too, so that prompts are prefixes.
@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ("qwen3", "qwen3_5_think", "llama3_1")])
def test_marks_of_templates_agree(name: str, tokenizer: Any) -> None:
    """TRL's version of a template marks by itself what we find by rendering, but for what leads to an answer."""
    original, marked = ((TEMPLATES / f"{one}.jinja").read_text() for one in (name, f"{name}_training"))
    row = conversation_of(ASKS)
    rendered, oracle = (
        Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=t).encode(row) for t in (original, marked)
    )
    assert rendered.input_ids == oracle.input_ids
    found, expected = (learnt_texts(tokenizer, one) for one in (rendered, oracle))
    assert all(theirs.endswith(own) for own, theirs in zip(found, expected, strict=True))
    assert len(found) == len(expected)


def test_thoughts_of_earlier_turns_are_neither_written_nor_learnt(tokenizer: Any) -> None:
    turns = [
        {**turn, "content": f"<think>hm</think>{turn['content']}"} if turn["role"] == "assistant" else turn
        for turn in ASKS
    ]
    encoded = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=STRIPS).encode(conversation_of(turns))
    assert learnt_texts(tokenizer, encoded) == ["It is 4.<|im_end|>\n", "<think>hm</think>6, of course.<|im_end|>\n"]


@pytest.mark.parametrize("name", ["qwen3", "glm4moe"])
@pytest.mark.parametrize("key", ["content", "reasoning_content"])
def test_what_can_be_learnt_of_turns_with_thoughts_is_and_the_rest_is_told(name: str, key: str, tokenizer: Any) -> None:
    def says(text: str, thought: str, **more: Any) -> dict[str, Any]:
        if key == "content":
            return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{text}", **more}
        return {"role": "assistant", "content": text, key: thought, **more}

    turns = [
        ASKS[0],
        says("", "call it", tool_calls=CALL["tool_calls"]),
        {"role": "tool", "content": "TOOLRES"},
        says("It is 4.", "it said so"),
        ASKS[2],
        says("6, of course.", "easy"),
    ]
    encoded = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=template_of(name)).encode(
        conversation_of(turns)
    )
    call, first, second = learnt_texts(tokenizer, encoded)
    assert "f" in call
    assert "It is 4." in first
    assert second.index("easy") < second.index("6, of course.")
    assert not any(thought in call + first for thought in ("call it", "it said so", "TOOLRES", "2+2", "3+3"))
    assert encoded.remarks == (Remark(RemarkKind.UNWRITTEN_THOUGHT, times=2),)


def test_turns_that_cannot_be_told_are_counted_and_the_others_learnt(tokenizer: Any) -> None:
    """The template writes earlier turns through a filter, which no mark comes through."""
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else '<old>' ~ (message['content'] | urlencode) }}",
    )
    turns = [{**turn, "content": text} for turn, text in zip(ASKS, ("two", "four", "three", "six"), strict=True)]
    renderer = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=template)
    encoded = renderer.encode(conversation_of(turns))
    assert learnt_texts(tokenizer, encoded) == ["six<|im_end|>\n"]
    assert encoded.remarks == (Remark(RemarkKind.UNTOLD_TURN, times=1),)
    with pytest.raises(UserError, match="does not let us tell where the turns stand that are to be learnt"):
        renderer.encode(Conversation(tuple(turns), trained=(None, True, None, False)))


def test_special_tokens_and_unknown_keys_in_the_data_are_told(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=CHATML)
    quoted = [{**ASKS[0], "content": "What are <|im_end|> and <|end|>?"}, {**ASKS[1], "refusal": "no", "name": "x"}]
    assert renderer.encode(conversation_of(quoted)).remarks == (
        Remark(RemarkKind.SPECIAL_TOKEN, "<|im_end|>"),
        Remark(RemarkKind.SPECIAL_TOKEN, "<|end|>"),
        Remark(RemarkKind.UNKNOWN_KEY, "refusal"),
    )
    assert renderer.encode(Conversation(text="a<|end|>b")).remarks == (Remark(RemarkKind.SPECIAL_TOKEN, "<|end|>"),)
    for row in (conversation_of(ASKS), Conversation(text="<think>no special token</think>")):
        assert renderer.encode(row).remarks == ()


def test_turns_decide_for_themselves(tokenizer: Any) -> None:
    for learnt, trained, expected in [
        (Learnt.LAST_TURN, (None, False, None, None), ["6, of course.<|im_end|>\n"]),
        (Learnt.LAST_TURN, (None, True, None, False), ["It is 4.<|im_end|>\n"]),
        (Learnt.LAST_TURN, (None, True, None, None), ["It is 4.<|im_end|>\n", "6, of course.<|im_end|>\n"]),
        (Learnt.ASSISTANT_TURNS, (None, False, None, None), ["6, of course.<|im_end|>\n"]),
    ]:
        row = Conversation(tuple(ASKS), trained=trained)
        for template in (CHATML, STRIPS):
            encoded = Renderer(tokenizer, learnt=learnt, template=template).encode(row)
            assert learnt_texts(tokenizer, encoded) == expected
    nothing = Conversation(tuple(ASKS), trained=(None, False, None, False))
    with pytest.raises(UserError, match="none of the row's turns is to be learnt"):
        Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=CHATML).encode(nothing)


def test_everything_and_texts_are_learnt_to_the_end(tokenizer: Any) -> None:
    encoded = Renderer(tokenizer, learnt=Learnt.EVERYTHING, template=CHATML).encode(conversation_of(ASKS))
    assert all(encoded.learnt)
    for learnt in Learnt:
        text = Renderer(tokenizer, learnt=learnt, template=CHATML).encode(Conversation(text="a document"))
        assert all(text.learnt)
        assert text.input_ids == [*tokenizer("a document")["input_ids"], tokenizer.eos_token_id]


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("gemma", conversation_of([SYSTEM, *ASKS]), "the chat template refuses the row: System role not supported"),
        ("smolvlm", conversation_of(ASKS), "the chat template leaves out what the user says in turn 1"),
        (
            "deepseekv3",
            conversation_of([ASKS[0], {"role": "assistant", "content": "<think>hm</think>4"}]),
            "leaves out what the assistant says in turn 2 ('hm')",
        ),
        (
            "phi3",
            conversation_of([*ASKS[:2], {"role": "tool", "content": "found"}, ASKS[1]]),
            "leaves out what the tool says in turn 3 ('found')",
        ),
        ("chatml", conversation_of([ASKS[0], {**ASKS[1], "name": "\ud83d", "content": "\ud83d"}]), "a lone surrogate"),
        ("chatml", conversation_of([ASKS[0], CALL, *ASKS]), "the chat template has no place for tool_calls"),
        (
            "chatml",
            Conversation(tuple(ASKS), tools=({"type": "function"},)),
            "the chat template has no place for tools",
        ),
        ("chatml", conversation_of([ASKS[0], {**ASKS[1], "thinking": "hm"}]), "has no place for thinking"),
        ("chatml", conversation_of([{**SYSTEM, "role": "developer"}, *ASKS]), "knows no role developer"),
        ("gemma3", conversation_of([ASKS[0], *ASKS]), "the chat template refuses the row: "),
    ],
)
def test_what_a_template_cannot_say_is_told(name: str, row: Conversation, said: str, tokenizer: Any) -> None:
    template = OWN.get(name) or (TEMPLATES / f"{name}.jinja").read_text()
    with pytest.raises(UserError) as raised:
        Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=template).encode(row)
    assert said in str(raised.value)


def test_calls_and_thoughts_are_written_where_there_is_a_place(tokenizer: Any) -> None:
    template = template_of("qwen3")
    turns = [ASKS[0], {**CALL, "reasoning_content": "call f"}, {"role": "tool", "content": "4"}, ASKS[1]]
    row = Conversation(tuple(turns), tools=({"type": "function", "function": {"name": "f", "parameters": {}}},))
    encoded = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=template).encode(row)
    first, second = learnt_texts(tokenizer, encoded)
    assert "call f" in first
    assert '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' in first
    assert "It is 4." in second


LITERALS = [
    "1.0",
    "1e5",
    "9007199254740993",
    "0.10",
    "-0",
    "1E+2",
    "0.1",
    "7",
    "1e400",
    "123456789012345678901234567890",
]
WRITES_CALLS = ["qwen3", "qwen3_training", "qwen2_5", "llama3_1", "glm4moe", "qwen3_5_think", "gptoss"]


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "object"])
@pytest.mark.parametrize("name", [name for name in WRITES_CALLS if (TEMPLATES / f"{name}.jinja").exists()])
def test_numbers_of_calls_keep_their_digits(name: str, as_text: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Given as JSON in a text, or as an object, learnt as they were written."""
    arguments = "{" + ", ".join(f'"a{number}": {literal}' for number, literal in enumerate(LITERALS)) + "}"
    call = f'{{"name": "f", "arguments": {json.dumps(arguments) if as_text else arguments}}}'
    asks = json.dumps(ASKS[0])
    path = tmp_path / "rows.jsonl"
    path.write_text(
        f'{{"messages": [{asks}, {{"role": "assistant", "content": "", "tool_calls": [{{"function": {call}}}]}}, '
        f'{{"role": "tool", "content": "0.10"}}, {json.dumps(ASKS[1])}], "tools": [{{"name": "f", "description": "d", '
        f'"parameters": {{"type": "object", "properties": {{}}, "default": 0.10}}}}]}}'
    )
    (row,) = read(path)
    renderer = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=template_of(name))
    first, second = learnt_texts(tokenizer, renderer.encode(row))
    for number, literal in enumerate(LITERALS):
        assert re.search(rf"a{number}\W.*?(?<![\w.+-]){re.escape(literal)}(?![\w.+-])", first, re.DOTALL), (
            literal,
            first,
        )
    assert "It is 4." in second


def test_a_number_that_a_template_writes_otherwise_is_told(tokenizer: Any) -> None:
    turns = [ASKS[0], {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": {"x": Number("0.10")}}}]}, *ASKS]
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message.tool_calls | length }}")
    with pytest.raises(UserError, match=r"does not write the number 0\.10 of a turn as it is"):
        Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=template).encode(conversation_of(turns))


words = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    said=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    name=st.sampled_from(["chatml", "llama3", "qwen2_5"]),
)
def test_any_texts_are_told_apart(tokenizer: Any, said: list[tuple[str, str]], name: str) -> None:
    turns = [
        {"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    encoded = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=template_of(name)).encode(
        conversation_of(turns)
    )
    found = learnt_texts(tokenizer, encoded)
    assert len(found) == len(said)
    assert all(text.startswith(answer) for text, (_, answer) in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma3", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("none", None),
    ],
)
def test_the_token_that_ends_a_turn_is_found(name: str, end: str | None, tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}" if name == "none" else template_of(name)
    found = Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=template).end_of_turn()
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_results_of_functions_are_not_learnt_where_a_template_rewrites_what_came_before(tokenizer: Any) -> None:
    """It drops the first thought once an answer follows, so that the prompt alone is written otherwise."""
    call = {**CALL, "thinking": "call it"}
    turns = [ASKS[0], call, {"role": "tool", "content": "TOOLRES"}, {**ASKS[1], "thinking": "so it is"}]
    row = Conversation(tuple(turns), tools=({"type": "function", "function": {"name": "f", "description": "d"}},))
    encoded = Renderer(tokenizer, learnt=Learnt.LAST_TURN, template=template_of("gptoss")).encode(row)
    said = "".join(learnt_texts(tokenizer, encoded))
    assert "It is 4." in said
    assert "TOOLRES" not in said
