from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epi_ds.data.skills import SKILLS, Row, Split, load_tokenizer, rows
from epi_ds.data.skills.tokenization import END, PAD, START, TOKENIZER_DIR
from epi_ds.data.skills.train_tokenizer import VOCABULARY, write

FAMILIES = list(SKILLS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def drawn(family: str, size: int = 50) -> list[Row]:
    return rows(family, split=Split.TEST, size=size, seed=11)


def test_training_again_gives_the_packaged_files(tmp_path: Path) -> None:
    write(tmp_path)
    names = sorted(path.name for path in TOKENIZER_DIR.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (TOKENIZER_DIR / name).read_bytes(), (
            f"{name} differs from what its source gives: run `python -m epi_ds.data.skills.train_tokenizer`"
        )


def test_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCABULARY
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)
    for token in (PAD, START, END):
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.decode(tokenizer.encode(f"{START}cat{END}"), skip_special_tokens=True) == "cat"


@pytest.mark.parametrize("text", ["7", "42", "1234567890", " 10 + 9 = 19.", "x1y22"])
def test_digits_are_single_tokens(tokenizer: Any, text: str) -> None:
    tokens = [tokenizer.decode([index]) for index in tokenizer.encode(text)]
    assert [token for token in tokens if any(map(str.isdigit, token))] == [c for c in text if c.isdigit()]


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two  spaces ", "line\n\n\tnext\r\n", "naïve 東京 🙂", "def f(x):\n    return x[:2]", "don't . , !"],
)
def test_decoding_restores_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_restores_rows(tokenizer: Any, family: str) -> None:
    for row in drawn(family):
        text = tokenizer.apply_chat_template(list(row.messages), tokenize=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_template_renders_every_turn(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    expected = f"{START}system\nBe brief.{END}\n{START}user\nHi{END}\n{START}assistant\nHello{END}\n{START}assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_starts_with_its_rendered_prompt(tokenizer: Any, family: str) -> None:
    for row in drawn(family):
        conversation, prompt = list(row.messages), list(row.prompt)
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert text == f"{head}{row.answer}{END}\n"
        ids = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
        head_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: len(head_ids)] == head_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistant_mask_covers_answers_and_their_end(tokenizer: Any, family: str) -> None:
    for row in drawn(family):
        encoded = tokenizer.apply_chat_template(list(row.messages), return_assistant_tokens_mask=True, return_dict=True)
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        learnt = tokenizer.decode([index for index, inside in pairs if inside])
        answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
        assert learnt == "".join(f"{answer}{END}" for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_short(tokenizer: Any, family: str, record_property: Any) -> None:
    conversations = [list(row.messages) for row in drawn(family, size=300)]
    lengths = sorted(len(ids) for ids in tokenizer.apply_chat_template(conversations, return_dict=True)["input_ids"])
    mean = sum(lengths) / len(lengths)
    record_property("mean_tokens", mean)
    print(f"{family}: {mean:.1f} tokens a row, at most {lengths[-1]}")
    assert lengths[int(0.95 * len(lengths))] < 128
