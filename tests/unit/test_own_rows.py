"""Which of the rows that a model wrote are kept, and what stands in their file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import epi_ds
from epi_ds.data.rendering import Learnt, Renderer
from epi_ds.data.skills import load_tokenizer
from epi_ds.errors import RemedyError, UserError
from epi_ds.own_rows.file import record_of, standing_in, write_rows
from epi_ds.own_rows.sifting import Draft, LeftOut, Sifter
from tests.support.few_words import few_words

ROWS = [{"text": "one"}, {"text": "two"}]


def draft(*turns: str, is_cut: bool = False) -> Draft:
    return Draft(turns, num_tokens=3, is_cut=is_cut)


def test_repeated_empty_and_cut_rows_are_left_out_and_counted() -> None:
    sifter = Sifter(3)
    for one in (
        draft("q", "a"),
        draft("q", "a\n"),
        draft("q", ""),
        draft("q", "b", is_cut=True),
        draft("q", "b"),
        draft(" ", "b"),
        draft("text"),
        # There are enough: with fewer ranks nobody would have begun it.
        draft("q", "b"),
    ):
        sifter.take(one)
    assert sifter.is_full
    assert sifter.left_out == {LeftOut.EMPTY: 2, LeftOut.CUT: 1, LeftOut.REPEATED: 1}
    assert sifter.told() == "2 empty, 1 cut, 1 repeated"
    assert sifter.num_tokens == 7 * 3
    assert sifter.rows == [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        {"text": "text"},
    ]


def test_rows_stand_until_somebody_edits_or_removes_them(tmp_path: Path) -> None:
    file, settings = tmp_path / "deep" / "own_rows.jsonl", {"rows": 2, "seed": 0}
    assert standing_in(file, settings) is None
    write_rows(file, ROWS, settings=settings, found={"left_out": {}})
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS
    assert record_of(file).name == "own_rows.written.json"
    standing = standing_in(file, settings)
    assert standing is not None
    assert (standing.num_rows, standing.is_edited) == (2, False)
    with pytest.raises(UserError, match=r"written with other settings: rows was 2, is 3; remove it"):
        standing_in(file, {**settings, "rows": 3})
    # Whoever edits rows wants them as they are, whatever they were written with.
    file.write_text(file.read_text() + json.dumps({"text": "three"}) + "\n")
    standing = standing_in(file, {**settings, "rows": 3})
    assert standing is not None
    assert (standing.num_rows, standing.is_edited) == (3, True)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no row, and what stands there is used as it is; remove it"):
        standing_in(file, settings)


def test_a_template_says_how_a_user_begins_and_ends() -> None:
    tokenizer = load_tokenizer()
    begun = Renderer(tokenizer, learnt=Learnt.LAST_TURN).user_turn()
    assert tokenizer.decode(begun.ids) == "<|start|>user\n"
    assert begun.end == tokenizer.convert_tokens_to_ids("<|end|>")


SETTINGS: dict[str, Any] = {"rows": 6, "batch_size": 4, "max_prompt_tokens": 6, "max_new_tokens": 6, "attempts": 20}


def test_rows_depend_on_their_seed_and_on_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = few_words()
    model.generation_config.repetition_penalty = 9.0
    random_state, kept = torch.get_rng_state(), model.generation_config
    texts = {}
    for seed, again in ((0, False), (0, True), (1, False)):
        file = tmp_path / f"{seed}{again}.jsonl"
        model.train()
        texts[seed, again] = epi_ds.write_own_rows(model, tokenizer, file=file, seed=seed, **SETTINGS).read_text()
        assert model.training
        torch.rand(3)
    assert texts[0, False] == texts[0, True] != texts[1, False]
    assert model.generation_config is kept
    torch.set_rng_state(random_state)
    rows = [json.loads(line) for line in texts[0, False].splitlines()]
    assert len(rows) == 6
    assert {len(row["messages"]) for row in rows} == {2}
    with caplog.at_level(logging.INFO):
        standing = tmp_path / "0False.jsonl"
        epi_ds.write_own_rows(model, tokenizer, file=standing, seed=0, **SETTINGS)
        assert "6 rows stand in" in caplog.text
        standing.write_text(standing.read_text().splitlines()[0] + "\n")
        epi_ds.write_own_rows(model, tokenizer, file=standing, seed=0, **SETTINGS)
        assert "holds 1 rows that were given, or edited since they were written" in caplog.text
    assert len(standing.read_text().splitlines()) == 1


def test_a_base_model_writes_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = few_words(template=None)
    file = epi_ds.write_own_rows(model, tokenizer, file=tmp_path / "texts.jsonl", **SETTINGS)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 6
    with pytest.raises(UserError, match="the tokenizer has none; set kind: texts"):
        epi_ds.write_own_rows(model, tokenizer, file=tmp_path / "a.jsonl", kind="conversations", **SETTINGS)
    # With so few words there are not so many texts.
    few = {**SETTINGS, "rows": 40, "max_new_tokens": 2, "attempts": 2}
    file = epi_ds.write_own_rows(model, tokenizer, file=tmp_path / "few.jsonl", **few)
    assert 0 < len(file.read_text().splitlines()) < 40
    assert "of the 40 rows that were asked for, in 2 attempts for each (left out:" in caplog.text


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model, tokenizer = few_words()
    with pytest.raises(UserError, match=r"temprature: unknown key; did you mean 'temperature'"):
        epi_ds.write_own_rows(model, tokenizer, file=tmp_path / "a.jsonl", temprature=2.0)
    tokenizer.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="ends a user's turn with no special token"):
        epi_ds.write_own_rows(model, tokenizer, file=tmp_path / "a.jsonl", **SETTINGS)
    model, tokenizer = few_words(template=None)
    with pytest.raises(RemedyError, match=r"no row that could be kept in 8 attempts \(left out: .* cut\)"):
        epi_ds.write_own_rows(
            model, tokenizer, file=tmp_path / "a.jsonl", rows=4, attempts=2, max_new_tokens=1, batch_size=8
        )
    assert not list(tmp_path.iterdir())
