"""Batches as the trainer collates them hold the tokens that a slow renderer writes, and learn those that it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from epi_ds.data.preparing import Tokens, prepare
from epi_ds.data.rendering import Learnt
from epi_ds.data.skills import load_tokenizer
from epi_ds.data.store import open_store
from epi_ds.data.table import Table
from epi_ds.errors import UserError
from tests.support.slow_renderer import Marks, answers_in, labelled, render
from tests.support.tables import write_lines

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = Marks("<|im_start|>assistant\n", "<|im_end|>\n")
LLAMA = Marks("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
GEMMA = Marks("<start_of_turn>model\n", "<end_of_turn>\n")
MARKS = {
    "chatml": IM,
    "strips thoughts": IM,
    "qwen2_5": IM,
    "qwen3": IM,
    "qwen3_instruct_2507": IM,
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "phi3": Marks("<|assistant|>\n", "<|end|>\n"),
    "deepseekv3": Marks("<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
}
OWN = {
    "chatml": CHATML,
    "strips thoughts": CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip() }}",
    ),
}
NAMES = [name for name in MARKS if name in OWN or (TEMPLATES / f"{name}.jinja").exists()]
THINKS = ("strips thoughts", "qwen3")
REFUSES_SYSTEM = ("gemma",)


def template_of(name: str) -> str:
    return OWN.get(name) or (TEMPLATES / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = load_tokenizer()
    marks = {mark.strip() for marks in MARKS.values() for mark in marks}
    # Those with characters that have several bytes are one token each, as in their model: others may have half of one.
    found.add_tokens([*sorted(marks), "<|im_start|>", "<bos>", "<\uff5cUser\uff5c>"], special_tokens=True)
    found.bos_token = "<bos>"
    return found


def talk(pairs: int, *, system: bool, thinks: bool) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for number in range(pairs):
        thought = f"<think>\nhm {number}\n</think>\n\n" if thinks and number % 2 else ""
        turns.append({"role": "user", "content": f"What is {number} + {number}? " + "Say it. " * (number % 4)})
        turns.append({"role": "assistant", "content": f"{thought}It is {2 * number}.\n\nAnd {'x' * number}"})
    return turns


def test_there_are_ten_templates() -> None:
    assert len(NAMES) >= 10


@pytest.mark.parametrize("learnt", [Learnt.LAST_TURN, Learnt.ASSISTANT_TURNS])
@pytest.mark.parametrize("name", NAMES)
def test_batches_equal_the_slow_renderers(name: str, learnt: Learnt, tokenizer: Any, tmp_path: Path) -> None:
    template = template_of(name)
    # More turns than each of which is rendered, and some that are alone.
    rows = [
        talk(pairs, system=name not in REFUSES_SYSTEM and pairs % 2 == 0, thinks=name in THINKS)
        for pairs in (1, 2, 3, 12, 4)
    ]
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": turns} for turns in rows])
    tokens = Tokens(tokenizer, learnt, template, max_length=None, keeps_end=False, packing=None)
    folder, _ = prepare(Table("rows", (path,)), tokens, cache=tmp_path / "cache", num_processes=1)
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    expected = []
    for turns in rows:
        written = render(template, turns, names)
        spans = answers_in(written, MARKS[name])
        assert len(spans) == sum(turn["role"] == "assistant" for turn in turns)
        expected.append(labelled(tokenizer, written, spans[-1:] if learnt is Learnt.LAST_TURN else spans))
    stored = list(open_store(folder))
    assert len(stored) == len(expected)
    for first in range(0, len(rows), 2):
        wanted, batch = expected[first : first + 2], collate(stored[first : first + 2])
        width = max(len(ids) for ids, _ in wanted)
        assert batch["input_ids"].tolist() == [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in wanted]
        assert batch["labels"].tolist() == [labels + [-100] * (width - len(labels)) for _, labels in wanted]
        assert batch["attention_mask"].tolist() == [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in wanted]


@pytest.mark.parametrize("name", REFUSES_SYSTEM)
def test_a_role_that_a_template_refuses_is_named_by_row(name: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [talk(2, system=False, thinks=False), talk(2, system=True, thinks=False)]
    with pytest.raises(ValueError, match="System role not supported"):
        render(template_of(name), rows[1], {"bos_token": ""})
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": turns} for turns in rows])
    tokens = Tokens(tokenizer, Learnt.LAST_TURN, template_of(name), None, keeps_end=False, packing=None)
    with pytest.raises(UserError, match=r"line 2: the chat template refuses the row: System role not supported"):
        prepare(Table("rows", (path,)), tokens, cache=tmp_path / "cache", num_processes=1)
