"""``model.lora``: what a recipe may say of a low-rank adapter, in the words of PEFT's ``LoraConfig``."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from epi_ds.errors import Problem, nearest
from epi_ds.recipe.trainer_arguments import plain_types

# What a run of stages decides itself.
_OWNED = (
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "auto_mapping",
    "peft_version",
    "revision",
    "runtime_config",
)
# What reads or copies the model's own weights when the adapter is made, of which a rank of ZeRO-3 has a slice.
_OF_WHOLE_WEIGHTS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_dora",
    "use_qalora",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
_INITIALISATIONS = (True, False, "gaussian")


class LoraSection(BaseModel):
    """A low-rank adapter that is trained in place of the weights; beside ``merge``, keys of PEFT's ``LoraConfig``.

    Such as ``r``, ``lora_alpha``, ``target_modules``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    merge: bool = True
    """Whether the export is a whole model with the adapter added to its weights, or the adapter alone."""

    @property
    def settings(self) -> dict[str, Any]:
        """What ``LoraConfig`` is made of."""
        return dict(self.model_extra or {})


class LoraKey(NamedTuple):
    """What one key of PEFT's ``LoraConfig`` may be."""

    types: tuple[str, ...]
    """As `plain_types` names them."""
    description: str
    """What PEFT says of it."""


def lora_keys() -> dict[str, LoraKey]:
    """Return the keys of ``LoraConfig`` that a recipe may give, by name; none where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from peft import LoraConfig

    hints = typing.get_type_hints(LoraConfig)
    return {
        field.name: LoraKey(plain_types(hints[field.name]), field.metadata.get("help", ""))
        for field in dataclasses.fields(LoraConfig)
        if field.name not in _OWNED
    }


def lora_problems(section: LoraSection) -> list[Problem]:
    """Return one problem per key that PEFT does not know, or that cannot work here. Imports PEFT."""
    known = lora_keys()
    if not known:
        return [Problem("model.lora", "needs peft, which is not installed here: pip install 'epi-ds[lora]'")]
    problems = []
    for name, value in section.settings.items():
        if name in _OWNED:
            problems.append(Problem(f"model.lora.{name}", "decided by the recipe; remove it"))
        elif name not in known:
            problems.append(Problem(f"model.lora.{name}", f"not a key of LoraConfig{nearest(name, known)}"))
        elif name in _OF_WHOLE_WEIGHTS and value:
            problems.append(
                Problem(
                    f"model.lora.{name}",
                    "takes whole weights when the adapter is made, of which ZeRO-3 leaves every rank a slice; remove "
                    "it",
                )
            )
    initialisation = section.settings.get("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        problems.append(
            Problem(
                "model.lora.init_lora_weights",
                f"{initialisation!r} takes whole weights when the adapter is made, of which ZeRO-3 leaves every rank a "
                "slice; set true, false or gaussian",
            )
        )
    if not problems:
        try:
            lora_config(section.settings)
        except (TypeError, ValueError) as error:
            problems.append(Problem("model.lora", str(error).splitlines()[0]))
    return problems


def lora_config(settings: Mapping[str, Any]) -> Any:
    """Return PEFT's configuration for a model of language."""
    from peft import LoraConfig, TaskType

    return LoraConfig(task_type=TaskType.CAUSAL_LM, **settings)
