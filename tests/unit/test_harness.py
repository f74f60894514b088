"""General ability by lm-evaluation-harness: our model behind its interface, its tasks, its results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epi_ds.data.skills import load_tokenizer
from epi_ds.demo.base_model import small_llama
from epi_ds.errors import RemedyError, UserError
from epi_ds.recipe.harness import HarnessSection
from epi_ds.recipe.loading import parse_recipe
from tests.support.harness_tasks import ALL, ANSWERS, CHOICES, TEXTS, write_tasks

# Below the longest requests of every task, and a window of the longest text.
MAX_LENGTH = 40
RECIPE: dict[str, Any] = {
    "model": {"path": "m"},
    "stages": [{"name": "s", "data": {"skill": "logic", "rows": 8}}],
    "output": "runs/r",
}


def load(section: HarnessSection) -> Any:
    from epi_ds.evaluation.harness.loading import load_tasks

    return load_tasks(section)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    """A model whose tokens are far from equally likely."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return small_llama(len(tokenizer), initializer_range=0.3, **sizes, **ends).eval(), tokenizer


@pytest.fixture(scope="module")
def both(model_and_tokenizer: tuple[Any, Any]) -> tuple[Any, Any]:
    """The model behind our class, and behind that of lm-evaluation-harness."""
    from lm_eval.models.huggingface import HFLM

    from epi_ds.evaluation.harness.language_model import HarnessModel
    from epi_ds.evaluation.held import HeldModel

    model, tokenizer = model_and_tokenizer
    device = torch.device("cpu")
    # 100 tokens: batches of two or three rows, where it has batches of four.
    held = HeldModel(model, tokenizer, device, gathered=True, batch_size=8, batch_tokens=100, show=lambda _: None)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=MAX_LENGTH, device="cpu")
    return HarnessModel(held, max_length=MAX_LENGTH), theirs


def test_results_are_those_of_its_own_class(folder: Path, both: tuple[Any, Any]) -> None:
    tasks = load(HarnessSection(tasks=ALL, include_path=str(folder))).tasks
    ours, theirs = both
    for name, ask in ((CHOICES, "loglikelihood"), (TEXTS, "loglikelihood_rolling"), (ANSWERS, "generate_until")):
        requests = tasks[name].instances
        with torch.no_grad():
            found, expected = (getattr(model, ask)(requests) for model in (ours, theirs))
        if name == CHOICES:
            # What is cut at its beginning, and a row that several choices are read off, are among them.
            assert any(len(ours.tok_encode("".join(one.args))) > MAX_LENGTH + 1 for one in requests)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            found, expected = ([value for value, _ in values] for values in (found, expected))
            assert max(expected) - min(expected) > 5
        if name == ANSWERS:
            assert found == expected
            assert len(set(found)) > 2
        else:
            # Other batches pad rows otherwise.
            assert found == pytest.approx(expected, abs=1e-4)


def test_scores_are_those_that_it_finds_with_its_own_class(folder: Path, both: tuple[Any, Any]) -> None:
    from lm_eval.evaluator import evaluate

    from epi_ds.evaluation.harness.harness import Harness

    ours, theirs = both
    section = HarnessSection(tasks=ALL, include_path=str(folder), limit=4, max_length=MAX_LENGTH)
    expected = evaluate(theirs, {"tasks": load(section).tasks}, limit=4, bootstrap_iters=0)["results"]
    harness = Harness(section)
    with torch.no_grad():
        scores = harness.score(ours._held)
        assert harness.score(ours._held) == scores
    assert {name: (score.metric, score.num_rows, score.higher_is_better) for name, score in scores.items()} == {
        f"lm_eval/{CHOICES}": ("acc_norm", 4, True),
        f"lm_eval/{TEXTS}": ("bits_per_byte", 3, False),
        f"lm_eval/{ANSWERS}": ("exact_match", 4, True),
    }
    for name in ALL:
        score = scores[f"lm_eval/{name}"]
        assert score.value == pytest.approx(expected[name][f"{score.metric},none"], abs=1e-5)


def test_solved_examples_are_the_same_at_every_evaluation(folder: Path) -> None:
    section = HarnessSection(tasks=[CHOICES], include_path=str(folder), num_fewshot=2)
    (one,), (other,) = (load(section).tasks.values() for _ in range(2))
    assert [request.args for request in one.instances] == [request.args for request in other.instances]
    assert one.instances[0].args[0].count("What comes next?") > 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "FileNotFoundError"),
        ({"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
        ({"test_split": "validation"}, "KeyError: 'validation'"),
        ({"unsafe_code": True}, "runs programs that the model writes"),
        ({"target_delimiter": None, "doc_to_choice": "choices", "doc_to_target": "{{nothing}}"}, "cannot be made"),
    ],
    ids=["no rows", "no such column", "no such split", "programs", "no answer"],
)
def test_a_task_that_cannot_be_scored_is_told_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    write_tasks(tmp_path, **changes)
    with pytest.raises(UserError, match=f"task {CHOICES} .*") as caught:
        load(HarnessSection(tasks=ALL, include_path=str(tmp_path)))
    assert told in str(caught.value)


def test_rows_that_would_have_to_be_fetched_are_the_environments_fault(tmp_path: Path) -> None:
    write_tasks(tmp_path, dataset_path="nobody/nothing", dataset_kwargs={})
    with pytest.raises(RemedyError, match=f"the rows of task {CHOICES} would have to be fetched"):
        load(HarnessSection(tasks=[CHOICES], include_path=str(tmp_path)))


@pytest.mark.slow
def test_an_unknown_name_is_told_with_the_nearest_and_with_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "torn.yaml").write_text("task: [own_torn")
    with pytest.raises(UserError) as caught:
        load(HarnessSection(tasks=[CHOICES, "own_choice", "arc_eazy"], include_path=str(folder)))
    message = str(caught.value)
    assert "'own_choice' (nearest: own_choices" in message
    assert "'arc_eazy' (nearest: arc_easy" in message
    assert "torn.yaml cannot be read: while parsing" in message
    (folder / "torn.yaml").unlink()


@pytest.mark.slow
def test_a_task_of_its_own_is_found_without_reading_all_of_them() -> None:
    from epi_ds.evaluation.harness.finding import find_tasks

    places = find_tasks(HarnessSection(tasks=["arc_easy", "piqa"]))
    assert {name: Path(path).name for name, path in places.files.items()} == {
        "arc_easy": "arc_easy.yaml",
        "piqa": "piqa.yaml",
    }
    assert places.known == {}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"tasks": []}, "evaluation.lm_eval.tasks: Tuple should have at least 1 item"),
        ({"tasks": ["a", "a"]}, "evaluation.lm_eval.tasks: a task is scored once, repeated: a"),
        ({"tasks": ["a"], "include_path": "nowhere"}, "evaluation.lm_eval.include_path: nowhere is no folder"),
        ({"tasks": ["a"], "limt": 3}, "evaluation.lm_eval.limt: unknown key; did you mean 'limit'?"),
    ],
    ids=["none", "repeated", "no folder", "misspelt"],
)
def test_a_recipe_is_refused_before_anything_is_loaded(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe({**RECIPE, "evaluation": {"lm_eval": values}}, place="the recipe")
    assert told in str(caught.value)


def test_a_recipe_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"evaluation.lm_eval: needs lm_eval, .* pip install 'epi-ds\[eval\]'"):
        parse_recipe({**RECIPE, "evaluation": {"lm_eval": {"tasks": ["piqa"]}}}, place="the recipe")


def results(metrics: dict[str, float], directions: dict[str, bool | None]) -> dict[str, Any]:
    return {"results": {"t": {"alias": "t", "sample_len": 5, **metrics}}, "higher_is_better": {"t": directions}}


@pytest.mark.parametrize(
    ("metrics", "directions", "expected"),
    [
        ({"acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}, {"acc": True, "acc_norm": True}, 0.5),
        ({"exact_match,strict": 0.1, "exact_match,flexible": 0.7}, {"exact_match": True}, 0.1),
        (
            {"word_perplexity,none": 9.0, "bits_per_byte,none": 0.9},
            {"word_perplexity": False, "bits_per_byte": False},
            0.9,
        ),
        ({"bleu,none": 25.0}, {"bleu": True}, 0.25),
        ({"odd,none": 3.0}, {"odd": False}, 3.0),
    ],
    ids=["acc_norm", "the first filter", "bits per byte", "out of a hundred", "its own"],
)
def test_one_metric_is_the_score(
    metrics: dict[str, float], directions: dict[str, bool | None], expected: float
) -> None:
    from epi_ds.evaluation.harness.results import score_of

    score = score_of("t", results(metrics, directions))
    assert (score.value, score.num_rows) == (expected, 5)
    assert score.higher_is_better is directions[str(score.metric)]


def test_a_metric_that_does_not_say_what_is_better_is_no_score() -> None:
    from epi_ds.evaluation.harness.results import score_of

    with pytest.raises(UserError, match="task t has no metric"):
        score_of("t", results({"odd,none": 3.0}, {"odd": None}))
