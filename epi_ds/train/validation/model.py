"""The model of a recipe without its weights: tokenizer, configuration, and parameters by name and shape."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from epi_ds.config import EPIConfig
from epi_ds.data.hub import is_hub_id
from epi_ds.errors import Problem, UserError
from epi_ds.isolation.fit import check_budget
from epi_ds.isolation.layout import Layout, Parameter, build_layout
from epi_ds.recipe.models import ModelSection, Recipe
from epi_ds.train.model import check_vocabulary, told
from epi_ds.train.rows import RowArguments, load_tokenizer
from epi_ds.train.validation.findings import Findings

_PATH = "model.path"
_WEIGHTS = ("*.safetensors", "*.bin")


class BareModel(NamedTuple):
    """What is known of a model without its weights."""

    tokenizer: Any
    """None where it is not here."""
    layout: Layout | None
    """Of its covered parameters on one rank; None where its configuration is not here, or with an adapter."""


def check_model(recipe: Recipe, arguments: RowArguments | None, findings: Findings) -> BareModel:
    """Return what is known of a recipe's model.

    arguments  None where they are wrong, and nothing can be tokenised
    """
    section = recipe.model
    if not Path(section.path).exists() and not is_hub_id(section.path):
        findings.unchecked(
            _PATH, f"there is no folder {section.path} here, so tokens and parameters are not known; files are read"
        )
        return BareModel(None, None)
    tokenizer = model = None
    with findings.told(_PATH):
        model = bare_model(section)
    if arguments is not None:
        # What keeps a model from being loaded mostly keeps its tokenizer, too, and is told once.
        with (Findings() if model is None else findings).told(_PATH):
            tokenizer = load_tokenizer(section, arguments)
    if model is not None and Path(section.path).is_dir():
        _check_files(section, findings)
    if model is not None and tokenizer is not None and recipe.train.get("chat_template_path") is None:
        with findings.told(_PATH):
            check_vocabulary(model, tokenizer, path=section.path)
    return BareModel(tokenizer, None if model is None else _layout_of(recipe, model, findings))


def bare_model(section: ModelSection) -> Any:
    """Return a model on the meta device, which holds no weights. Raises what `told` raises."""
    with told(section.path):
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        given = {} if section.attn_implementation is None else {"attn_implementation": section.attn_implementation}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **given)


def _check_files(section: ModelSection, findings: Findings) -> None:
    if not any(next(Path(section.path).glob(pattern), None) for pattern in _WEIGHTS):
        findings.problem(Problem(_PATH, f"{section.path} holds no weights (.safetensors or .bin); restore its files"))


def _layout_of(recipe: Recipe, model: Any, findings: Findings) -> Layout | None:
    if recipe.model.lora is not None:
        findings.unchecked("model.lora", "the modules that the adapter is put on, and its parameters")
        return None
    try:
        layout = layout_of(model, recipe.method.epi)
    except UserError as error:
        setting = re.match(r"(include|exclude|layer)\b", str(error))
        key = f"method.epi.{setting[1]}" if setting else "method.epi"
        findings.problem(Problem(key, str(error).removeprefix(f"{setting[1]}: " if setting else "")))
        return None
    with findings.told("method.epi.ratio"):
        check_budget(layout, recipe.method.epi)
    return layout


def layout_of(model: Any, config: EPIConfig) -> Layout:
    """Return the layers of a model's covered parameters, as one rank that has all of them would see them.

    Raises UserError for patterns of the ``epi`` section that match nothing, or several.
    """
    parameters = [Parameter(name, tuple(one.shape)) for name, one in model.named_parameters() if one.requires_grad]
    return build_layout(
        [parameters], rank=0, world_size=1, layer=config.layer, include=config.include, exclude=config.exclude
    )
