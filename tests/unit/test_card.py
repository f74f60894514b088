"""The card of a run: what it says, that nothing of the machine is in it, and whose card stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from epi_ds.launch import recipes
from epi_ds.recipe.brief import brief
from epi_ds.recipe.document import read_yaml
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.sources import Files
from epi_ds.report.card import RunRecord, card_of, ensure_card
from epi_ds.report.published import published
from epi_ds.train.origins import FromHub, taken_from_hub

SECRET = "hf_" + "aBcD1234" * 4
VALUES: dict[str, Any] = {
    "model": {"path": "/scratch/jane/models/base"},
    "stages": [
        {"name": "gsm8k", "data": {"path": "openai/gsm8k", "subset": "main"}, "steps": 30},
        {
            "name": "own",
            "data": [
                {"path": "/home/jane/own data/new.jsonl", "share": 0.75},
                {"glob": "~/more/*.jsonl", "share": 0.25},
            ],
            "learning_rate": 1e-5,
        },
    ],
    "method": {"preset": "strong", "keep": {"data": {"skill": "logic", "rows": 64}, "replay": 0.125}},
    "train": {"learning_rate": 2e-5, "hub_token": SECRET, "run_name": "of /home/jane/x", "eos_token": "<|end|>"},
    "output": "/scratch/jane/runs/mine",
}


def evaluation(step: int, stage: str, **scores: float) -> dict[str, Any]:
    return {
        "event": "evaluation",
        "step": step,
        "stage": stage,
        "stage_ended": True,
        "scores": {
            name.replace("__", "/"): {"value": value, "num_rows": 40, "higher_is_better": not name.startswith("base")}
            for name, value in scores.items()
        },
    }


METRICS = [
    {
        "event": "run",
        "step": 0,
        "world_size": 8,
        "stages": {"gsm8k": [0, 30], "own": [30, 50]},
        "rows": {"gsm8k": [7473], "own": [1200, 400]},
        "environment": {"epi-ds": "0.1.0", "torch": "2.9.0", "host": "node-of-jane", "system": "Linux-of-jane"},
        "changed": [],
        "from_hub": {"model": None, "datasets": ["openai/gsm8k"]},
    },
    evaluation(0, "start", gsm8k=0.25, base__own_rows=1.5),
    evaluation(30, "gsm8k", gsm8k=0.75, base__own_rows=1.625),
    evaluation(50, "own", gsm8k=0.5, base__own_rows=1.75),
    {"event": "summary", "step": 50, "stage": "own", "active_share": 0.9, "achieved_ratio": 0.0498},
]


def record(values: dict[str, Any] = VALUES, metrics: list[dict[str, Any]] = METRICS) -> RunRecord:
    recipe = json.loads(parse_recipe(values, place="test", files=Files.ARE_NOT_LOOKED_FOR).model_dump_json())
    return RunRecord("mine", recipe, brief(recipe), metrics)


def test_it_says_what_was_trained_protected_and_scored() -> None:
    card = card_of(record())
    for said in (
        "| gsm8k | openai/gsm8k, main (7,473 rows) | 30 steps | 30 | 2e-05 |",
        r"| own | new.jsonl (1,200 rows); \*.jsonl (400 rows) | 1 | 20 | 1e-05 |",
        "* Preset `strong`, which came to:",
        "Isolation (policy `evolving`): 5.00% of the covered parameters do not move.",
        "4.98% were isolated at the end; a mask was in force in 90% of the steps.",
        "pulled back towards what it was before its stage (strength 4, in proportion to importance, `pull: update`)",
        "Rows that were kept: `logic`, 512 rows that the model wrote itself before training.",
        "12.50% of every batch were drawn from them.",
        "| task | rows | before | after gsm8k | after own | forgetting |",
        r"| base/own\_rows | 40 | 1.500 | 1.625 | 1.750 | 0.250 |",
        "| gsm8k | 40 | 25.0% | 75.0% | 50.0% | 25.0% |",
        "Forgotten of what was to be kept: loss +0.250. Mean forgetting: 25.0%.",
        "epi-ds 0.1.0, torch 2.9.0; on 8 ranks.",
    ):
        assert said in card, said
    assert card == card_of(record())


def test_what_comes_from_the_hub_is_known_where_a_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        **VALUES,
        "model": {"path": "me/base"},
        "method": {"keep": {"data": [{"path": "me/kept"}, {"path": "rows/old.jsonl"}]}},
    }
    recipe = parse_recipe(values, place="test", files=Files.ARE_NOT_LOOKED_FOR)
    assert taken_from_hub(recipe) == FromHub("me/base", ("openai/gsm8k", "me/kept"))
    for name in ("me/base", "openai/gsm8k"):
        Path(name).mkdir(parents=True)
    assert taken_from_hub(recipe) == FromHub(None, ("me/kept",))


def test_its_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(card_of(record())).data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["epi_ds", "sft", "continual-learning"],
        "datasets": ["openai/gsm8k"],
    }
    of_hub = {**VALUES, "model": {"path": "me/base", "revision": "v2"}}
    run = {**METRICS[0], "from_hub": {"model": "me/base", "datasets": []}}
    card = card_of(record(of_hub, [run]))
    assert ModelCard(card).data.base_model == "me/base"
    assert "Fine-tuned from [me/base](https://huggingface.co/me/base) at revision `v2` with epi_ds" in card
    # A folder may be called like that, too.
    card = card_of(record(of_hub))
    assert ModelCard(card).data.base_model is None
    assert "Fine-tuned from `me/base`, a folder where it was trained, with epi_ds" in card
    unknown = {name: value for name, value in METRICS[0].items() if name != "from_hub"}
    card = card_of(record(of_hub, [unknown]))
    assert ModelCard(card).data.base_model is None
    assert "Fine-tuned from `me/base` with epi_ds" in card
    adapter = record()
    lora = {**adapter.recipe, "model": {**adapter.recipe["model"], "lora": {"r": 4, "merge": False}}}
    data = ModelCard(card_of(adapter._replace(recipe=lora))).data
    assert (data.library_name, data.tags[-1]) == ("peft", "lora")


def test_its_recipe_is_the_run_s_without_the_machine() -> None:
    card = card_of(record())
    block = card.partition("```yaml\n")[2].partition("\n```")[0]
    assert parse_recipe(yaml.safe_load(block), place="the card", files=Files.ARE_NOT_LOOKED_FOR) == parse_recipe(
        {
            **VALUES,
            "model": {"path": "base"},
            "stages": [
                VALUES["stages"][0],
                {
                    **VALUES["stages"][1],
                    "data": [{"path": "new.jsonl", "share": 0.75}, {"glob": "*.jsonl", "share": 0.25}],
                },
            ],
            "train": {"learning_rate": 2e-5, "run_name": "of x", "eos_token": "<|end|>"},
            "output": "mine",
        },
        place="test",
        files=Files.ARE_NOT_LOOKED_FOR,
    )
    assert not any(word in card for word in ("jane", "scratch", "/home", "~", SECRET, "hub_token"))


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_without_its_defaults_is_the_same_recipe(name: str) -> None:
    values = read_yaml(recipes.text(name))
    recipe = parse_recipe(values, place=name, files=Files.ARE_NOT_LOOKED_FOR)
    short = brief(json.loads(recipe.model_dump_json()))
    assert parse_recipe(short, place=name, files=Files.ARE_NOT_LOOKED_FOR) == recipe
    assert len(json.dumps(short)) < len(recipe.model_dump_json()) / 2


@pytest.mark.parametrize(
    "method",
    [
        {
            "preset": "strong",
            "keep": {"replay": 0, "windows": 3},
            "epi": {"anchor": None, "protects": "past_and_present"},
        },
        {"preset": "balanced", "keep": None},
        {"preset": "data_free", "epi": {"anchor": {"strength": 0}}},
        {"keep": {"self": 8}, "epi": {"protects": "past_and_present"}},
        {"keep": {"self": 8, "importance": False}},
    ],
    ids=str,
)
def test_a_default_that_is_given_against_a_preset_stays(method: dict[str, Any]) -> None:
    values = {"model": {"path": "m"}, "stages": VALUES["stages"][:1], "method": method, "output": "o"}
    recipe = parse_recipe(values, place="test")
    assert parse_recipe(brief(json.loads(recipe.model_dump_json())), place="brief") == recipe


def test_a_run_without_protection_scores_or_releases_says_so() -> None:
    plain = {**VALUES, "method": {"epi": {"ratio": 0}}}
    earlier = [{name: value for name, value in METRICS[0].items() if name not in ("rows", "environment")}]
    card = card_of(record(plain, earlier))
    assert "None: plain fine-tuning." in card
    assert "Nothing was evaluated in this run." in card
    assert "## Versions" not in card
    assert "| gsm8k | openai/gsm8k, main | 30 steps | 30 | 2e-05 |" in card


def test_settings_that_a_resume_changed_are_told_but_for_secrets() -> None:
    changed = [
        {"key": "train.learning_rate", "before": 1e-5, "now": 2e-5},
        {"key": "model.path", "before": "/home/jane/a", "now": "/home/jane/b"},
        {"key": "train.hub_token", "before": None, "now": SECRET},
    ]
    resumed = {**METRICS[0], "step": 20, "changed": changed}
    card = card_of(record(metrics=[*METRICS, resumed]))
    assert "| 21 | train.learning\\_rate | 1e-05 | 2e-05 |\n| 21 | model.path | a | b |\n" in card
    assert "hub" not in card.partition("Settings that were changed")[2].partition("##")[0]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("/data/x y/rows.jsonl", "rows.jsonl"),
        ("/data/shards/*.parquet", "*.parquet"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("../../jane/rows.jsonl", "rows.jsonl"),
        ("gsm8k/train.jsonl", "gsm8k/train.jsonl"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("--config /etc/me/x.json", "--config x.json"),
        ("a/b and/or c", "a/b and/or c"),
        (f"token {SECRET}", "token (left out)"),
        (
            {"nvme_path": "/local/nvme", "api_key": "k", "pad_token": "<pad>"},
            {"nvme_path": "nvme", "pad_token": "<pad>"},
        ),
        ([1e-5, None, True, "/a/b"], [1e-5, None, True, "b"]),
    ],
    ids=str,
)
def test_what_is_told_of_a_setting(setting: Any, told: Any) -> None:
    assert published(setting) == told


def test_a_card_that_somebody_wrote_stays(tmp_path: Path) -> None:
    assert ensure_card(record(), tmp_path) == (tmp_path / "README.md", True)
    assert ensure_card(record(), tmp_path) == (tmp_path / "README.md", False)
    card = tmp_path / "README.md"
    card.write_text("# My own words\n")
    assert not ensure_card(record(), tmp_path).is_new
    assert card.read_text() == "# My own words\n"
    # PEFT's and TRL's, which nobody filled in.
    for template in ("- **License:** [More Information Needed]\n", "of [None](https://huggingface.co/None).\n"):
        card.write_text(template)
        assert ensure_card(record(), tmp_path).is_new
        assert card.read_text() == card_of(record())
