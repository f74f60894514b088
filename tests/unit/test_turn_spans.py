"""Turns are found by few renderings, and stand where rendering what leads to each of them says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from epi_ds.data.conversation import conversation_of
from epi_ds.data.rendering import Learnt, Renderer
from epi_ds.data.skills import load_tokenizer
from epi_ds.data.turn_spans import TurnSpans, common_prefix_length

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN = {
    "chatml": CHATML,
    "strips thoughts": CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip() }}",
    ),
    "empty thought": CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"),
    "counts turns": CHATML.replace("<|im_start|>{{", "<|im_start|>{{ loop.index }} {{").replace(
        "<|im_start|>assistant", "<|im_start|>{{ messages | length + 1 }} assistant"
    ),
    # It speaks otherwise to the turns in the middle, which is neither the first, the last nor half of the way.
    "odd one out": CHATML.replace(
        "{{ message['content'] }}<|im_end|>",
        "{{ message['content'] }}{{ '<|odd|>' if loop.index0 == 7 else '' }}<|im_end|>",
    ),
    "trims": CHATML.replace("message['content'] }}", "message['content'] | trim }}"),
}
SHIPPED = [
    "llama3",
    "qwen3",
    "qwen2_5",
    "qwen3_5_think",
    "gemma3",
    "phi3",
    "deepseekv3",
    "cohere2",
    "glm4moe",
    "gptoss",
]
SHIPPED = [name for name in SHIPPED if (TEMPLATES / f"{name}.jinja").exists()]
NAMES = [*OWN, *SHIPPED]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = load_tokenizer()
    found.bos_token = "<bos>"
    return found


def spans_of(tokenizer: Any, name: str, turns: list[dict[str, Any]]) -> tuple[TurnSpans, str, list[str]]:
    """Return the finder of a conversation, its text, and a list that gets an entry for every rendering."""
    template = OWN.get(name) or (TEMPLATES / f"{name}.jinja").read_text()
    renderer, row = Renderer(tokenizer, learnt=Learnt.ASSISTANT_TURNS, template=template), conversation_of(turns)
    written: list[str] = []

    def write(messages: Any, asks: bool) -> str:
        written.append(renderer.text(messages, row, prompt=asks))
        return written[-1]

    whole = renderer.text(turns, row)
    return TurnSpans(turns, whole, write, renderer.tokens_and_ends), whole, written


def answers_of(turns: list[dict[str, Any]]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]


def talk(pairs: int, *, seed: int = 0, thoughts: bool = False, ends: bool = False) -> list[dict[str, Any]]:
    drawn = random.Random(seed)
    turns: list[dict[str, Any]] = []
    for number in range(pairs):
        said = drawn.choice(["yes", "<b>no</b>", "<think", "a\nb", "assistant", "x" * drawn.randrange(1, 30)])
        # Thoughts of few turns, so that kinds mix.
        thought = f"<think>\nhm {number}\n</think>\n\n" if thoughts and drawn.random() < 0.5 else ""
        space = drawn.choice(["", " ", "\n"]) if ends else ""
        turns.append({"role": "user", "content": f"{space}q{number} {drawn.choice(['', 'user', '?'])}{space}"})
        turns.append({"role": "assistant", "content": f"{thought}{said}{space}"})
    return turns


@pytest.mark.parametrize("name", NAMES)
def test_turns_stand_where_rendering_each_of_them_says(name: str, tokenizer: Any) -> None:
    for turns in (talk(3), talk(14), talk(14, thoughts=True), talk(9, ends=True)):
        if name in ("deepseekv3", "gptoss") and any("</think>" in turn["content"] for turn in turns):
            continue
        finder, whole, _ = spans_of(tokenizer, name, turns)
        answers = answers_of(turns)
        slow = {index: span for index in answers if (span := finder.rendered(index)) is not None}
        assert finder.find(answers) == slow
        if name != "odd one out":
            assert list(slow) == answers
        for index, span in slow.items():
            said = turns[index]["content"].split("</think>")[-1].strip()
            assert said in whole[span.start : span.stop] or said.startswith("<")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), pairs=st.integers(5, 12), name=st.sampled_from(NAMES), thoughts=st.booleans())
def test_any_turns_stand_there(tokenizer: Any, seed: int, pairs: int, name: str, thoughts: bool) -> None:
    turns = talk(pairs, seed=seed, thoughts=thoughts and name in ("qwen3", "chatml", "strips thoughts", "glm4moe"))
    finder, _, _ = spans_of(tokenizer, name, turns)
    slow = {index: span for index in answers_of(turns) if (span := finder.rendered(index)) is not None}
    assert finder.find(answers_of(turns)) == slow


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "gemma3"])
def test_the_cost_of_a_long_conversation_is_about_linear(name: str, tokenizer: Any) -> None:
    """In what is written while turns are looked for: rendering each of them writes the square."""
    written = []
    for pairs in (40, 160):
        finder, whole, log = spans_of(tokenizer, name, talk(pairs, seed=3))
        assert len(finder.find(range(1, 2 * pairs, 2))) == pairs
        written.append(sum(map(len, log)) / len(whole))
    assert written[1] < 1.5 * written[0]


@pytest.mark.parametrize(
    ("name", "thoughts"),
    [("qwen2_5", False), ("qwen3", False), ("qwen3", True), ("glm4moe", True), ("qwen3_5_think", True)],
)
def test_turns_of_an_agent_stand_there(name: str, thoughts: bool, tokenizer: Any) -> None:
    """Calls with and without a text, results, and thoughts that are left out once the user speaks again."""
    turns: list[dict[str, Any]] = []
    for number in range(24):
        call = {"type": "function", "function": {"name": "f", "arguments": {"number": number}}}
        thought = {"reasoning_content": f"hm {number}"} if thoughts else {}
        turns += [{"role": "user", "content": f"q{number}"}] if number % 8 == 0 else []
        text = "look" if number % 3 == 0 else ""
        turns += [{"role": "assistant", "content": text, "tool_calls": [call], **thought}]
        turns += [{"role": "tool", "content": f"r{number}"}]
        turns += [{"role": "assistant", "content": f"so {number}", **thought}] if number % 8 == 7 else []
    finder, whole, _ = spans_of(tokenizer, name, turns)
    answers = answers_of(turns)
    found = finder.find(answers)
    assert found == {index: finder.rendered(index) for index in answers}
    for index, span in found.items():
        said, others = whole[span.start : span.stop], ("q", "r")
        number = turns[index].get("tool_calls", [{"function": {"arguments": {"number": ""}}}])[0]["function"][
            "arguments"
        ]
        assert turns[index]["content"] in said
        assert str(number["number"]) in said
        assert not any(f"{letter}{one}" in said for letter in others for one in range(24))


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_the_common_prefix_is_the_longest(one: list[int], other: list[int]) -> None:
    length = common_prefix_length(one, other)
    assert one[:length] == other[:length]
    assert one[length : length + 1] != other[length : length + 1] or length in (len(one), len(other))
