"""README and docs/ say what is there: links, commands, settings, error messages, and Python that runs.

What needs ranks runs in one call over two of them. README's whole script runs under three launchers in
tests/end_to_end/test_documentation.py; the line of docs/scripts.md that resumes a trainer is one of that script.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer.main
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

import epi_ds
from epi_ds import ds_configs
from epi_ds.cli.main import app
from epi_ds.config import EPIConfig
from epi_ds.data.skills import SKILLS
from epi_ds.launch import recipes
from epi_ds.launch.environment import prepare_environment
from epi_ds.recipe.harness import HarnessSection
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.study.models import Study
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path for folder in ("epi_ds", "kernels", "launch", "ds_configs") for path in sorted((ROOT / folder).rglob("*.py"))
]
# Folders of the repository; others are of whoever works in it.
TOP = {"epi_ds", "kernels", "launch", "ds_configs", "tests", "docs", "docker"}
# Of sbatch, srun, accelerate and the deepspeed command, which pages name without the command.
FOREIGN_OPTIONS = {"--signal", "--mpi", "--use_deepspeed", "--no_ssh_check", "--module"}
README_LINES = 180


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# --- what a page consists of ---


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}: {self.text.splitlines()[0]}"


_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@cache
def blocks_of(page: Path) -> list[Block]:
    return [Block(page, match[1], match[2]) for match in _FENCE.finditer(page.read_text())]


@cache
def prose_of(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def codes_in(prose: str) -> list[str]:
    """Inline code, on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def slug(heading: str) -> str:
    """The anchor of a heading, on which GitHub and MkDocs agree as long as nothing in it is exotic."""
    words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
    found = re.sub(r"\s", "-", words)
    assert "--" not in found, f"GitHub and MkDocs make different anchors of {heading!r}"
    return found


def anchors_of(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose_of(page).splitlines() if line.startswith("#")}


def blocks_in(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


# --- links ---


@each_page
def test_relative_links_and_anchors_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} leads nowhere"
        if page.is_relative_to(ROOT / "docs"):
            assert found.is_relative_to(ROOT / "docs"), f"{target} is not on the site"
        if anchor:
            assert anchor in anchors_of(found), f"{target}: no such heading"


def test_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


# --- commands ---


def shell_lines(page: Path) -> Iterator[str]:
    for block in blocks_of(page):
        if block.language in ("", "sh", "bash"):
            yield from block.text.replace("\\\n", " ").splitlines()


def commands_on(page: Path) -> Iterator[list[str]]:
    """Every command of a page's shell blocks and inline code, as words, without what a shell makes of it."""
    for line in [*shell_lines(page), *codes_in(prose_of(page))]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            # No command: an apostrophe in a drawing, or a piece of Python.
            continue
        for is_operator, command in itertools.groupby(words, key=lambda word: word in ("&&", "||", "|", ";", ">", "<")):
            if not is_operator:
                yield list(command)


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def checked_epi_ds(arguments: list[str]) -> None:
    """Fail unless there is such a command with such options. What they would do is not looked at."""
    command = command_line()
    # One that has no value, of epi-ds itself.
    rest = arguments[1:] if arguments[0] == "--debug" else list(arguments)
    while hasattr(command, "commands") and rest and rest[0] != "--help":
        assert rest[0] in command.commands, f"epi-ds {' '.join(arguments)}: there is no {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    try:
        command.make_context("epi-ds", rest, resilient_parsing=True)
    except Exception as error:
        pytest.fail(f"epi-ds {' '.join(arguments)}: {error}")


@each_page
def test_commands_exist(page: Path) -> None:
    for words in commands_on(page):
        if "epi-ds" in words and (arguments := words[words.index("epi-ds") + 1 :]):
            checked_epi_ds(arguments)
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            for target in targets:
                assert re.search(rf"^(.* )?{target}( .*)?:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                    f"make {target}"
                )
        for word in words:
            # test_x.py is of an operation to be written.
            if re.match(r"(tests|docker|docs|launch|ds_configs)/[\w./-]+$", word) and not word.endswith("_x.py"):
                assert (ROOT / word).exists(), f"there is no {word}"


def verbs_below(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, verb in getattr(command, "commands", {}).items():
        yield (*words, name), verb
        yield from verbs_below(verb, *words, name)


def test_every_verb_stands_in_a_panel_and_its_help_ends_with_an_example() -> None:
    panels = {verb.rich_help_panel for verb in command_line().commands.values()}
    assert panels == {"Before a run", "During a run", "After a run", "Studies and measurements"}
    verbs = list(verbs_below(command_line()))
    assert len(verbs) > 40
    for words, verb in verbs:
        assert verb.epilog, f"epi-ds {' '.join(words)}: its help has no example"
        mark, example = verb.epilog.split(": ", 1)
        assert mark == "Example"
        # What a shell makes of it is no argument.
        command, *arguments = shlex.split(example.partition(" > ")[0])
        assert command == "epi-ds"
        assert tuple(arguments[: len(words)]) == words
        checked_epi_ds(arguments)


def test_every_shipped_recipe_stands_in_the_documentation() -> None:
    assert set(recipes.names()) <= set(codes_in(prose_of(ROOT / "docs" / "recipes.md")))


@cache
def all_paths() -> str:
    """Every file and folder of the repository, a line each that ends in a semicolon; folders with a slash before it."""
    places = [path for path in ROOT.iterdir() if path.name in TOP or path.is_file()]
    found = [*places, *(inside for place in places if place.is_dir() for inside in place.rglob("*"))]
    return "".join(f"/{path.relative_to(ROOT)}{'/' * path.is_dir()};" for path in found)


# Folders of a run, and files that users have.
NOT_OURS = {
    "checkpoints/checkpoint-N/",
    "export/",
    "export/README.md",
    "slurm/",
    "finetune.py",
    "zero_to_fp32.py",
    ".py",
}


@each_page
def test_files_and_folders_exist(page: Path) -> None:
    for code in codes_in(prose_of(page)):
        # `search/sketch.py` is any file whose path ends so; x is an operation to be written.
        is_path = re.match(r"[\w./{},-]+(\.py|\.cpp|\.md|\.toml|/)$", code) and not re.search(r"\bx\.|_x\.", code)
        if is_path and code not in NOT_OURS and not code.startswith(("~", "/")):
            braces = re.match(r"(.*)\{(.*)\}(.*)", code)
            names = [braces[1] + part + braces[3] for part in braces[2].split(",")] if braces else [code]
            for name in names:
                is_there = f"/{name};" in all_paths()
                assert is_there, f"there is no {name}"


def all_options() -> set[str]:
    found, commands = set(), [command_line()]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        found |= {option for parameter in command.params for option in parameter.opts}
    return found


@each_page
def test_options_that_are_named_alone_exist(page: Path) -> None:
    named = {code.split("=")[0].split()[0] for code in codes_in(prose_of(page)) if re.match("--[a-z]", code)}
    assert named <= all_options() | FOREIGN_OPTIONS


# --- settings ---


@cache
def models_in(model: type[BaseModel]) -> list[type[BaseModel]]:
    return list(settings_pages().nested_models(model))


@cache
def trainer_arguments() -> set[str]:
    prepare_environment()
    import dataclasses

    from trl import SFTConfig

    return {field.name for field in dataclasses.fields(SFTConfig)}


@cache
def deepspeed_names() -> set[str]:
    """Words of DeepSpeed's configuration, read from its source: importing it takes longer than all of these tests."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    runtime = Path(spec.origin).parent / "runtime"
    sources = [runtime / "constants.py", runtime / "config.py", *sorted((runtime / "zero").glob("*config.py"))]
    text = "\n".join(path.read_text() for path in sources)
    return set(re.findall(r'"(\w+)"', text)) | set(re.findall(r"^    (\w+): ", text, re.MULTILINE))


def is_setting(path: str) -> bool:
    """Whether a dotted path is a key of the ``epi`` section, of a recipe, a study, a trainer, or of DeepSpeed."""
    first, *rest = re.sub(r"\[\]", "", path).split(".")
    if first == "train":
        return not rest or rest[0] in trainer_arguments()
    if first == "stages":
        # A stage is named by its name or its position.
        rest = rest[1:] if len(rest) > 1 else rest
        return not rest or all(is_key_in(Recipe, part) for part in rest)
    if first in ("epi", "method") or first in Recipe.model_fields:
        return all(is_key_in(Recipe, part) or is_key_in(EPIConfig, part) for part in rest)
    if first in EPIConfig.model_fields:
        return all(is_key_in(EPIConfig, part) for part in rest)
    if is_key_in(Study, first):
        return all(is_key_in(Study, part) for part in rest)
    if not rest and (is_key_in(Recipe, first) or is_key_in(EPIConfig, first) or first in trainer_arguments()):
        return True
    return first in deepspeed_names() and all(part in deepspeed_names() for part in rest)


def is_key_in(model: type[BaseModel], name: str) -> bool:
    return any(name in nested.model_fields for nested in models_in(model))


_SECTIONS = r"(?:checkpoint|train|method|stages|evaluation|epi|zero_optimization|offload_optimizer|offload_param)"
_SETTING = re.compile(rf"^({_SECTIONS}(?:\[\])?(?:\.\w+)+)$|^([a-z_0-9]+(?:\.\w+)*)(?:: (.+)|=([^=\s]\S*))$")


# The first cell of a row on the troubleshooting page, which begins with what is quoted.
_MESSAGE = r"^\| (`.*?) \|(?=.*\|.*\|$)"


def settings_in(prose: str) -> Iterator[tuple[str, str | None]]:
    """Keys with their values: ``key: value``, ``key=value`` and dotted names in inline code, and tables of keys."""
    # What messages quote is not all of settings.
    prose = re.sub(_MESSAGE, "", prose, flags=re.MULTILINE)
    for code in codes_in(prose):
        if code != "key=value" and (match := _SETTING.match(code)):
            yield match[1] or match[2], match[3] or match[4]
    for table in re.findall(r"^\| (?:key|setting) \|.*\n\|[-| ]+\n((?:\|.*\n?)+)", prose, re.MULTILINE):
        for row in table.splitlines():
            cell = row.replace(r"\|", "").split("|")[1]
            yield from ((code.split(":")[0], None) for code in codes_in(cell))


@each_page
def test_settings_exist(page: Path) -> None:
    for key, value in settings_in(prose_of(page)):
        assert is_setting(key), f"{name_of(page)}: {key} is no setting"
        if value is not None and key in EPIConfig.model_fields and "..." not in value:
            try:
                TypeAdapter(EPIConfig.model_fields[key].annotation).validate_python(yaml.safe_load(value))
            except ValidationError as error:
                pytest.fail(f"{name_of(page)}: {key}: {value}: {error}")


def test_every_kind_of_setting_is_told_from_none() -> None:
    for key in ("ratio", "checkpoint.keep_last", "method.epi.ratio", "train.learning_rate", "stages.0.epochs"):
        assert is_setting(key)
    for key in ("zero_optimization.offload_optimizer.ratio", "stages[].lr_scheduler_type", "ema_decay"):
        assert is_setting(key)
    for key in ("ration", "checkpoint.keep", "method.epi.retio", "train.lerning_rate", "zero_optimization.stagee"):
        assert not is_setting(key)


@cache
def settings_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_settings", ROOT / "docs" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_of_settings_are_what_the_models_say() -> None:
    module = settings_pages()
    for page in module.PAGES:
        committed = (ROOT / "docs" / page.name).read_text()
        assert committed == module.markdown_of(page), f"docs/{page.name} is not of these models; run {module.COMMAND}"


def test_presets_and_skills_are_all_there() -> None:
    assert set(ds_configs.names()) <= set(codes_in(prose_of(ROOT / "docs" / "scripts.md")))
    recipes = prose_of(ROOT / "docs" / "recipes.md")
    assert all(re.search(rf"\b{skill}\b", recipes) for skill in SKILLS)


def is_task_file(block: Block) -> bool:
    """Whether it is one of lm-evaluation-harness, and no recipe."""
    return block.text.startswith("task:")


def test_task_files_are_loaded_with_the_row_that_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from epi_ds.evaluation.harness.loading import load_tasks

    monkeypatch.chdir(tmp_path)
    (block,) = filter(is_task_file, blocks_in("yaml"))
    (row,) = re.findall(r"`(\{\"context\".*?\})`", (ROOT / "docs" / "recipes.md").read_text())
    (data,) = re.findall(r"data_files: \{test: ([\w/.]+)\}", block.text)
    for path, text in (("tasks/own.yaml", block.text), (data, row)):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    name = yaml.safe_load(block.text)["task"]
    section = HarnessSection(tasks=[name], include_path="tasks")
    requests = load_tasks(section).tasks[name].instances
    context, choices = json.loads(row)["context"], json.loads(row)["choices"]
    assert [request.args for request in requests] == [(context, choice) for choice in choices]


@pytest.mark.parametrize(
    "block", [block for block in blocks_in("yaml") if not is_task_file(block)], ids=lambda block: block.place
)
def test_recipes_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"path: ([\w/]+\.(?:jsonl?|parquet))", block.text):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    # As a recipe is read: 1e-5 is a number there.
    values = yaml.safe_load(re.sub(r"\b(\d)e-", r"\1.0e-", block.text))
    assert parse_recipe(values, place=block.place).stages


# --- error messages ---


def texts_of(path: Path) -> Iterator[str]:
    """Every string of a source; where a value is put in there is a NUL."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield re.sub(r"%[.\d]*[sdf]", "\0", node.value)


def test_messages_of_the_troubleshooting_page_are_raised_somewhere() -> None:
    texts = "\n\n".join(text for path in SOURCES for text in texts_of(path))
    prose = prose_of(ROOT / "docs" / "troubleshooting.md")
    messages = [code for cell in re.findall(_MESSAGE, prose, re.MULTILINE) for code in codes_in(cell)]
    assert len(messages) > 80
    for message in messages:
        pattern = "[^\n]*?".join(re.escape(part.strip()) for part in message.split("..."))
        assert re.search(pattern, texts), f"nothing says {message!r}"


# --- Python ---

PYTHON = blocks_in("python")
# The first line of what is not run here: a whole script, and a line of it. See the top of this file.
OF_THE_SCRIPT = ("# finetune.py", "trainer.train(resume_from_checkpoint=epi_ds.newest_checkpoint(args.output_dir))")


def is_of_the_script(block: Block) -> bool:
    return block.text.splitlines()[0] in OF_THE_SCRIPT


def test_what_is_not_run_here_is_one_script() -> None:
    script, *lines = [block.text for block in PYTHON if is_of_the_script(block)]
    assert lines
    assert all(line in script for line in lines)
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "epi_ds":
            assert hasattr(epi_ds, node.attr), f"epi_ds.{node.attr}"


def tokenizer_of(size: int) -> Any:
    """A tokenizer of so many words, without a chat template; 1 begins a text and 2 ends it, as Llama's do."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"word{number}": number for number in range(3, size)}}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def run_fragments(fragments: list[str], folder: str) -> list[str]:
    """Run pieces of Python, each with the names that a reader would have; return what went wrong."""
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.engines import ds_config

    sizes = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    section = {"ratio": 0.1, "refresh_interval": 1}
    wrong = []
    os.chdir(folder)
    for index, fragment in enumerate(fragments):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        tokens = torch.arange(12).view(2, 6)
        names: dict[str, Any] = {
            "epi_ds": epi_ds,
            "itertools": itertools,
            "json": json,
            "model": model,
            "tokenizer": tokenizer_of(sizes["vocab_size"]),
            "ds_config": ds_config(epi=section),
            "loader": [{"input_ids": tokens, "labels": tokens}] * 3,
            "importance": torch.rand(1000),
            "received": epi_ds.QuantileSketch().to_bytes(),
        }
        used = {node.id for node in ast.walk(ast.parse(fragment)) if isinstance(node, ast.Name)}
        for name in ("engine", "other_engine"):
            if name not in used or f"{name}, *_ =" in fragment:
                continue
            other = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
            names[name] = deepspeed.initialize(model=other, config=ds_config())[0]
            if f"attach({name}" not in fragment:
                epi_ds.attach(names[name], section)
        try:
            exec(compile(fragment, f"fragment {index}", "exec"), names)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error} in\n{fragment}")
    return wrong


@pytest.mark.slow
def test_python_runs_on_two_ranks(tmp_path: Path) -> None:
    fragments = [block.text for block in PYTHON if not is_of_the_script(block)]
    assert len(fragments) >= 5
    for wrong in run_ranks(run_fragments, 2, fragments, str(tmp_path)):
        assert wrong == []
