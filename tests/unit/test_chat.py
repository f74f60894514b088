"""Talking to a model: its answers are those that transformers generates for the whole conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from epi_ds.data.skills import load_tokenizer
from epi_ds.demo.base_model import small_llama
from epi_ds.errors import UserError
from epi_ds.recipe.models import ModelSection
from epi_ds.train.chat import Answer, Chat, LoadedModel, load
from epi_ds.train.exported import base_of, model_of
from epi_ds.train.printable import printable
from epi_ds.train.sampling import Sampling, sampling_of
from tests.support.tags import make_checkpoint

LONGEST = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing, with a template, whose generation is set to sample."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    torch.manual_seed(0)
    model = small_llama(1024, hidden_size=16, num_hidden_layers=2, max_position_embeddings=LONGEST)
    model.generation_config = GenerationConfig(eos_token_id=1, do_sample=True, temperature=0.5, top_p=0.5, top_k=3)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer()
    tokenizer.eos_token = "<|start|>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(ModelSection(path=str(folder)), what="FOLDER")


@pytest.fixture(scope="module")
def without_template(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    base = tmp_path_factory.mktemp("base")
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (base / path.name).symlink_to(path)
    return load(ModelSection(path=str(base)), what="FOLDER")


def asked(chat: Chat, said: str) -> tuple[Answer, str]:
    """Return an answer and what was shown of it meanwhile."""
    shown: list[str] = []
    answer = chat.ask(said, shown.append)
    assert len(shown) > 1
    return answer, "".join(shown)


def greedy(loaded: LoadedModel, ids: list[int], *, most: int) -> str:
    prompt = torch.tensor([ids])
    tokens = loaded.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=most
    )
    text: str = loaded.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
    return text


def in_template(loaded: LoadedModel, messages: list[dict[str, str]]) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_conversation_goes_on_and_begins_anew(loaded: LoadedModel) -> None:
    chat = Chat(loaded, max_new_tokens=6, system="Be brief.")
    first, shown = asked(chat, "What is 3 + 4?")
    assert first.text == shown
    messages = [turn("system", "Be brief."), turn("user", "What is 3 + 4?")]
    assert first.text == greedy(loaded, in_template(loaded, messages), most=6)
    messages += [turn("assistant", first.text), turn("user", "And 5?")]
    second, _ = asked(chat, "And 5?")
    assert second.text == greedy(loaded, in_template(loaded, messages), most=6)
    chat.begin_anew()
    assert asked(chat, "What is 3 + 4?")[0] == first


def test_an_answer_ends_where_the_template_ends_a_turn(loaded: LoadedModel) -> None:
    chat = Chat(loaded, max_new_tokens=6)
    assert asked(chat, "Say 7.")[0].is_cut
    end = loaded.tokenizer.convert_tokens_to_ids("<|end|>")
    # The model's own files say that it stops elsewhere.
    assert end != loaded.tokenizer.eos_token_id

    def prefer_end(_: Any, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., end] = logits.amax(-1) + 1
        return logits

    handle = loaded.model.get_output_embeddings().register_forward_hook(prefer_end)
    try:
        chat.begin_anew()
        answer = chat.ask("Say 7.", lambda _: None)
    finally:
        handle.remove()
    assert answer == Answer("", is_cut=False)


def test_a_model_without_a_template_goes_on_with_a_text(without_template: LoadedModel) -> None:
    chat = Chat(without_template, max_new_tokens=4)
    assert not without_template.has_template
    tokenizer = without_template.tokenizer
    first, _ = asked(chat, "Once upon")
    assert first.text == greedy(without_template, tokenizer("Once upon")["input_ids"], most=4)
    second, _ = asked(chat, "The end")
    text = f"Once upon{first.text}\nThe end"
    assert second.text == greedy(without_template, tokenizer(text)["input_ids"], most=4)


def test_samples_depend_on_the_seed_and_on_nothing_else(loaded: LoadedModel) -> None:
    def answers(seed: int) -> list[str]:
        chat = Chat(loaded, max_new_tokens=8, sampling=Sampling(seed=seed))
        found = [asked(chat, "Say 7.")[0].text]
        # What another conversation draws meanwhile.
        torch.rand(7)
        chat.begin_anew()
        return [*found, asked(chat, "Say 7.")[0].text]

    before = torch.get_rng_state()
    once, again, other = answers(0), answers(0), answers(1)
    assert once == again
    assert len({*once, *other}) == 4
    torch.set_rng_state(before)
    asked(Chat(loaded, max_new_tokens=8, sampling=Sampling()), "Say 7.")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_conversation_beyond_the_context_is_told(loaded: LoadedModel) -> None:
    chat = Chat(loaded, max_new_tokens=1000)
    answer, _ = asked(chat, "Say 7.")
    assert answer.is_cut
    with pytest.raises(UserError, match=rf"tokens by now, and .* takes {LONGEST}; begin a new one \(/new\)"):
        chat.ask("And 8?", lambda _: None)


def test_an_interrupted_answer_is_forgotten(loaded: LoadedModel) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    chat = Chat(loaded, max_new_tokens=6)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Say 8.", interrupt)
    assert asked(chat, "Say 7.") == asked(Chat(loaded, max_new_tokens=6), "Say 7.")


def test_a_template_without_a_place_for_a_system_turn_is_told(loaded: LoadedModel) -> None:
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = loaded.tokenizer.chat_template
    try:
        for other, said in ((silent, "does not write what --system says"), (refusing, "no system")):
            loaded.tokenizer.chat_template = other
            with pytest.raises(UserError, match=said):
                Chat(loaded, max_new_tokens=6, system="Be brief.")
    finally:
        loaded.tokenizer.chat_template = template


def test_options_of_sampling() -> None:
    assert sampling_of(is_asked=False, temperature=None, top_p=None, seed=None) is None
    assert sampling_of(is_asked=True, temperature=None, top_p=0.9, seed=None) == Sampling(1.0, 0.9, 0)
    with pytest.raises(UserError, match=r"--top-p 0\.9 says how tokens are drawn, .* add --sample"):
        sampling_of(is_asked=False, temperature=None, top_p=0.9, seed=1)
    with pytest.raises(UserError, match="--temperature 0 leaves nothing to draw"):
        sampling_of(is_asked=True, temperature=0, top_p=None, seed=None)


def test_what_a_model_writes_moves_no_cursor() -> None:
    written = "a\x1b]0;title\x07\x1b[2J\r\x9b1mb\x7f\n\té\u3042\U0001f600"
    assert printable(written) == "a␛]0;title␇␛[2J␍\\x9b1mb␡\n\té\u3042\U0001f600"


def test_a_run_is_its_export_once_it_has_ended(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert model_of("me/model") == "me/model"
    assert model_of(str(folder)) == str(folder)
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"model": {"path": "me/base", "revision": "v2", "lora": {"r": 4}}}))
    with pytest.raises(
        UserError, match=r"has not ended, .* `epi-ds export .*checkpoint-N OUT`.*no checkpoint is whole"
    ):
        model_of(str(run))
    checkpoint = make_checkpoint(run / "checkpoints" / "checkpoint-4", step=4)
    with pytest.raises(UserError, match=r"has not ended, .* `epi-ds export .*checkpoint-4 OUT`, and give OUT$"):
        model_of(str(run))
    with pytest.raises(UserError, match=r"is a checkpoint, .* `epi-ds export .*checkpoint-4 OUT`"):
        model_of(str(checkpoint))
    (run / "export").symlink_to(folder)
    assert model_of(str(run)) == str(run / "export")
    adapter = tmp_path / "adapter"
    (adapter / "export").mkdir(parents=True)
    for name in ("recipe.json", "export/adapter_config.json", "export/tokenizer_config.json"):
        (adapter / name).write_text("{}")
    assert model_of(str(adapter)) == str(adapter / "export")
    assert base_of(str(run)) == ModelSection(path="me/base", revision="v2")
    with pytest.raises(UserError, match="is no run, so its base is not known"):
        base_of(str(folder))
