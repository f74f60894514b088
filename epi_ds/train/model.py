"""The model of a recipe, loaded whole or refused: transformers logs what it lacks and makes it up at random."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from epi_ds.data.rendering import Learnt, Renderer
from epi_ds.errors import RemedyError, UserError
from epi_ds.recipe.models import ModelSection

logger = logging.getLogger(__name__)

_SHOWN = 5
# What transformers and torch say of weights that have other shapes than the model.
_OTHER_SHAPES = ("Error(s) in loading state_dict", "ignore_mismatched_sizes")


def load_model(section: ModelSection, *, what: str = "model.path") -> Any:
    """Return the model, its weights partitioned where a DeepSpeed configuration of transformers says so.

    what  names the path in messages

    Raises UserError for a path that holds no model of language, for weights that its files lack, but for those that
    `ModelSection.allow_missing` names, and for weights of other shapes.
    """
    with told(section.path, what=what):
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                section.path,
                dtype=section.dtype,
                revision=section.revision,
                output_loading_info=True,
                **({"attn_implementation": section.attn_implementation} if section.attn_implementation else {}),
            )
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _OTHER_SHAPES):
                raise
            raise UserError(
                f"the weights in {section.path} have other shapes than its config.json says: {_first_of(str(error))}; "
                "restore the files that belong together"
            ) from error
    missing = sorted(
        name for name in found["missing_keys"] if not any(re.search(pattern, name) for pattern in section.allow_missing)
    )
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(
            f"{section.path} lacks the weights {', '.join(missing[:_SHOWN])}{more}, which would be trained from random "
            "ones; restore its files, or name them in model.allow_missing if they are meant to be new"
        )
    return model


def check_vocabulary(model: Any, tokenizer: Any, *, path: str) -> None:
    """Raise UserError where the tokenizer has tokens that the model has no embedding of."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, and the model an embedding of {rows}; use the "
            "model's own tokenizer, or resize its embedding and save it"
        )


def stop_at_the_end_of_a_turn(model: Any, tokenizer: Any) -> None:
    """Have a model's generation stop, in evaluation and as exported, at the token that the rows end an answer with."""
    end = Renderer(tokenizer, learnt=Learnt.LAST_TURN).end_of_turn()
    config = model.generation_config
    # All ranks find the same.
    tells = os.environ.get("RANK", "0") == "0"
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end is None:
        if tells:
            logger.warning(
                "the chat template ends an answer with no special token, so the model will not learn to stop"
            )
    elif end not in (*stops, tokenizer.eos_token_id):
        config.eos_token_id = [*(stop for stop in stops if stop is not None), end]
        if tells:
            name = tokenizer.convert_ids_to_tokens(end)
            logger.warning("answers end with %s, at which the model did not stop; it does now, also as exported", name)


def device_of_one_process() -> torch.device:
    """Return where a process without ranks holds a whole model: the accelerator, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    return accelerator


@contextmanager
def told(path: str, *, what: str = "model.path") -> Iterator[None]:
    """Turn what transformers raises for a path that it cannot load into one message with its remedy.

    Raises UserError for what is not there or no such model, and RemedyError where the hub cannot be reached.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        said = _first_of(str(error))
        if Path(path).exists() or isinstance(error, ValueError):
            raise UserError(f"{what} {path} cannot be loaded: {said}; give a language model's folder or id") from error
        if isinstance(error, ConnectionError) or "connect" in str(error).lower() or "offline" in str(error).lower():
            raise RemedyError(
                f"{what} {path} is no folder here, and the hub cannot be reached: {said}; check the path or the "
                "network, or fetch the model where there is one and give its folder"
            ) from error
        raise UserError(f"{what} {path} is neither a folder here nor a model of the hub: {said}") from error


def _first_of(text: str) -> str:
    """Return a library's message up to its second line of text."""
    return " ".join(line.strip() for line in text.splitlines()[:2]).strip()
