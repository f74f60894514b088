"""What a model and a table of rows are, before there is a recipe, and a recipe for them. Reads no weights."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from epi_ds.data.sources import find_files
from epi_ds.data.table import Reading, Table, describe, read_table
from epi_ds.errors import UserError
from epi_ds.recipe.document import read_yaml
from epi_ds.recipe.draft import DataFacts, Draft, ModelFacts, Sizes, recipe_text
from epi_ds.recipe.loading import parse_recipe
from epi_ds.train.model import told
from epi_ds.train.rows import load_tokenizer, row_arguments_of


def look_at_model(path: str, *, what: str) -> ModelFacts:
    """Return what the configuration and the tokenizer of a model say.

    path  a folder, or a hub id
    what  names it in messages

    Raises what `told` raises.
    """
    with told(path, what=what):
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(path)
    return ModelFacts(path, model.num_parameters(), has_template=tokenizer.chat_template is not None)


def look_at_data(path: str, *, say: Callable[[str], None]) -> DataFacts:
    """Read a table to its end, as a run would, and return what it is.

    path  a file, or the id of a data set of the hub
    say   is called with each sentence that a run would log of it

    Raises UserError for what cannot be read, by file and row, and where no row can be trained on.
    """
    table, reading = Table(name=path, files=find_files(path)), Reading()
    num_rows = sum(1 for _ in read_table(table, reading))
    for level, text in describe(table, reading):
        say(f"{logging.getLevelName(level).lower()}: {text}")
    if reading.format is None:
        raise UserError(f"{path} has no row to train on; check the file")
    num_left_out = sum(reading.left_out_counts.values())
    return DataFacts(path, reading.format.format, num_rows + num_left_out, num_left_out)


def checked_text(draft: Draft, sizes: Sizes) -> str:
    """Return the recipe of a draft, after it was read and its tokenizer was made as a run does.

    Raises UserError for a name that no stage can have, and for a chat template that cannot be loaded.
    """
    text = recipe_text(draft, sizes)
    recipe = parse_recipe(read_yaml(text), place="what is written from these options")
    load_tokenizer(recipe.model, row_arguments_of(recipe))
    return text
