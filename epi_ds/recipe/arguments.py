"""What a recipe's ``train`` section may hold: arguments of TRL's ``SFTConfig``, but those that belong to the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from epi_ds import ds_configs
from epi_ds.config import SECTION
from epi_ds.ds_configs.keys import misspelt, misspelt_problem
from epi_ds.ds_configs.values import changed, expanded
from epi_ds.errors import Problem, UserError, nearest, summarize
from epi_ds.recipe.trainer_arguments import PLAIN, trainer_arguments
from epi_ds.trackers import trackers_in

_DEFAULT_DEEPSPEED = "zero3"
# Key of ``train.deepspeed`` that names what its other keys change.
_PRESET = "preset"

# TrainingArguments that a run of stages decides itself, or that would break it without a word, and what to set instead.
_OWNED_ARGUMENTS = {
    "output_dir": "output",
    "num_train_epochs": "stages[].epochs",
    "max_steps": "stages[].steps",
    "resume_from_checkpoint": "nothing: a run continues from its newest complete checkpoint",
    "train_sampling_strategy": "nothing: rows are permuted per stage from train.seed",
    "shuffle_dataset": "nothing: rows are permuted per stage from train.seed",
    "ignore_data_skip": "nothing: a resumed run must not train rows twice",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "eval_delay": "evaluation.every",
    "eval_on_start": "evaluation, which scores before the first stage",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "do_train": "nothing",
    "do_eval": "evaluation",
    "do_predict": "evaluation",
    "accelerator_config": "nothing: it is set for ZeRO-3",
    "use_cpu": "the environment variable DS_ACCELERATOR=cpu",
    "fsdp": "nothing: training is ZeRO-3",
    "dataset_text_field": "stages[].data.messages, or prompt and completion",
    "auto_find_batch_size": "train.per_device_train_batch_size: a retry would change which rows a step trains",
    "save_only_model": "nothing: without optimizer and importance no run can continue",
    "enable_jit_checkpoint": "train.save_steps",
    "load_best_model_at_end": "nothing: the export is of the last step",
    "metric_for_best_model": "nothing: the export is of the last step",
    "greater_is_better": "nothing: the export is of the last step",
    "push_to_hub": "nothing: a checkpoint is no model for the hub; epi-ds push sends the export",
    "optim": "optimizer in the DeepSpeed configuration (train.deepspeed)",
}


# TRL's losses that were tried under ZeRO-3 on several ranks; tests/zero3/test_trl.py compares each with its definition.
_LOSSES = ("nll", "dft")
# Others that TRL takes, and why they are not taken here.
_OTHER_LOSSES = {"chunked_nll": "TRL's old name of nll, which computes the same; set nll"}


class Range(NamedTuple):
    """Numbers that an argument may have."""

    least: float
    below: float = math.inf
    includes_least: bool = True

    def holds(self, value: float) -> bool:
        """Whether a value is one of them."""
        return (value >= self.least if self.includes_least else value > self.least) and value < self.below

    def as_schema(self) -> dict[str, float]:
        """Return it in the words of JSON Schema."""
        found = {"minimum" if self.includes_least else "exclusiveMinimum": self.least}
        return found if self.below == math.inf else {**found, "exclusiveMaximum": self.below}

    def __str__(self) -> str:
        least = f"at least {self.least}" if self.includes_least else f"above {self.least}"
        return least if self.below == math.inf else f"{least} and below {self.below}"


# Words that an argument may have: others are left to libraries.
_CHOICES = {
    "save_strategy": ("no", "steps", "epoch"),
    "logging_strategy": ("no", "steps", "epoch"),
    "truncation_mode": ("keep_start", "keep_end"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "loss_type": ("nll", "dft"),
}

# Numbers that end in a division by zero, or in a traceback of a library, when ranks have started.
_RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "dataset_num_proc",
            "ddp_timeout",
            "torch_empty_cache_steps",
        ),
        Range(1),
    ),
    **dict.fromkeys(("learning_rate", "logging_steps", "adam_epsilon"), Range(0, includes_least=False)),
    **dict.fromkeys(
        ("max_grad_norm", "weight_decay", "warmup_steps", "save_steps", "dataloader_num_workers"), Range(0)
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(0, below=1)),
    "seed": Range(0, below=1 << 32),
    "data_seed": Range(0, below=1 << 32),
}


class Argument(NamedTuple):
    """What one argument in ``train`` may be."""

    types: tuple[str, ...]
    """Names in `PLAIN`; empty where it takes others too."""
    choices: tuple[str, ...]
    """The words that it may be, or hold; empty where there is no list of them."""
    range: Range | None
    description: str
    """As Markdown."""


def arguments() -> dict[str, Argument]:
    """Return what ``train`` may hold, by name. Raises ModuleNotFoundError, by its name, where TRL is not installed."""
    found = trainer_arguments()
    types = {**found.types, "deepspeed": ("str", "dict")}
    choices = {
        **_CHOICES,
        "loss_type": _LOSSES,
        "lr_scheduler_type": found.schedules,
        "report_to": (*found.trackers, "all", "none"),
    }
    return {
        name: Argument(kinds, choices.get(name, ()), _RANGES.get(name), found.descriptions[name])
        for name, kinds in types.items()
        if name not in _OWNED_ARGUMENTS
    }


def deepspeed_config(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration that ``train.deepspeed`` names, loads, changes or holds, by default ``zero3``.

    The ``epi`` section of a shipped one is left out, see `preset_section`. Raises ValueError for one that a run of
    stages cannot use.
    """
    config, problems = read_config(train)
    if problems:
        raise UserError(summarize(problems, place="train.deepspeed"))
    return config


class ReadConfig(NamedTuple):
    """A DeepSpeed configuration, and what is wrong with it as one of a recipe."""

    config: dict[str, Any]
    problems: list[Problem]


def read_config(train: Mapping[str, Any]) -> ReadConfig:
    """Return the DeepSpeed configuration of a ``train`` section, and what is wrong with it, by its dotted keys."""
    preset = _preset_of(train)
    if preset is None:
        config = dict(train["deepspeed"])
    else:
        try:
            config = changed(ds_configs.read(preset.name_or_path), preset.changes, source=preset.name_or_path)
        except UserError as error:
            return ReadConfig({}, [Problem("", str(error))])
        is_changed = any(str(key).split(".")[0] == SECTION for key in preset.changes)
        if ds_configs.is_shipped(preset.name_or_path) and not is_changed:
            config.pop(SECTION, None)
    problems = [misspelt_problem(*found) for found in misspelt(config)]
    if SECTION in config:
        problems.append(Problem(SECTION, f'the configuration has an "{SECTION}" section, but a recipe has method.epi'))
    if "scheduler" in config:
        problems.append(
            Problem(
                "scheduler",
                'the configuration has a "scheduler" section, which would replace the schedules of the stages; remove '
                "it and set stages[].lr_scheduler_type or train.lr_scheduler_type",
            )
        )
    if preset is not None:
        try:
            config = expanded(config, source=preset.name_or_path)
        except UserError as error:
            problems.append(Problem("", str(error)))
    return ReadConfig(config, problems)


def preset_section(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``epi`` section of the shipped configuration in ``train.deepspeed``: what ``method.epi`` begins from.

    Empty where that is none, or has no such section.
    """
    preset = _preset_of(train)
    if preset is None or not ds_configs.is_shipped(preset.name_or_path):
        return {}
    return dict(ds_configs.read(preset.name_or_path).get(SECTION, {}))


class _Preset(NamedTuple):
    """A configuration by name or path, and what is merged over it."""

    name_or_path: str
    changes: Mapping[str, Any]


def _preset_of(train: Mapping[str, Any]) -> _Preset | None:
    """Return what ``train.deepspeed`` refers to, or None where it is a whole configuration."""
    given = train.get("deepspeed", _DEFAULT_DEEPSPEED)
    if not isinstance(given, Mapping):
        return _Preset(str(given), {})
    if _PRESET not in given:
        return None
    return _Preset(str(given[_PRESET]), {key: value for key, value in given.items() if key != _PRESET})


def argument_problems(train: Mapping[str, Any]) -> list[Problem]:
    """Return one problem per argument that is unknown, of the wrong type, or not the user's to set."""
    problems = [Problem(f"train.{name}", text) for name, value in train.items() for text in _problems_of(name, value)]
    prepared = train.get("dataset_kwargs")
    if isinstance(prepared, Mapping) and prepared.get("skip_prepare_dataset"):
        problems.append(
            Problem("train.dataset_kwargs", "skip_prepare_dataset would train the first stage only; remove it")
        )
    return [*problems, *(problem.within("train.deepspeed") for problem in read_config(train).problems)]


def _problems_of(name: str, value: Any) -> Iterator[str]:
    """Yield what is wrong with an argument by itself."""
    valid = trainer_arguments().types
    if name in _OWNED_ARGUMENTS:
        yield f"decided by the recipe; set {_OWNED_ARGUMENTS[name]}"
    elif name not in valid:
        yield f"not an argument of SFTConfig{nearest(name, valid)}"
    elif name == "lr_scheduler_type":
        yield from schedule_problems(value)
    elif name == "loss_type":
        yield from _loss_problems(value)
    elif name == "report_to":
        yield from _tracker_problems(value)
    elif name in _CHOICES and value not in _CHOICES[name]:
        hint = "; YAML reads a bare no as false, so give its quotes too" if value is False else ""
        yield f"must be {_listed(_CHOICES[name])}, got {value!r}{hint}"
    elif name != "deepspeed" and not _is_of(valid[name], value):
        yield f"must be {_named(valid[name])}, got {value!r}"
    elif name in _RANGES and isinstance(value, (int, float)) and not _RANGES[name].holds(value):
        yield f"must be {_RANGES[name]}, got {value!r}"


def _loss_problems(name: object) -> Iterator[str]:
    if name not in _LOSSES:
        tried = f"none of the losses that were tried under ZeRO-3: {', '.join(_LOSSES)}"
        yield f"{name!r} is {_OTHER_LOSSES.get(str(name), tried)}{nearest(str(name), _LOSSES)}"


def _tracker_problems(given: object) -> Iterator[str]:
    """Yield what is wrong with what ``report_to`` names."""
    valid = trainer_arguments().trackers
    for name in trackers_in(given):
        if name not in (*valid, "all"):
            yield f"{name!r} is no tracker{nearest(name, valid)}; there are {', '.join(valid)}, all and none"


def _listed(words: tuple[str, ...]) -> str:
    """Return words as a rule gives them, in the quotes that YAML needs around ``no``."""
    return " or ".join(", ".join(map(repr, words)).rsplit(", ", 1))


def schedule_problems(name: object) -> list[str]:
    """Return what is wrong with the name of a learning-rate schedule; empty if nothing is."""
    valid = trainer_arguments().schedules
    if name in valid:
        return []
    return [f"{name!r} is no schedule{nearest(str(name), valid)}; there are {', '.join(valid)}"]


def _is_of(types: tuple[str, ...], value: object) -> bool:
    """Whether a value fits where an argument takes plain types only; others are left to TrainingArguments."""
    for name in types:
        with suppress(ValidationError):
            TypeAdapter(PLAIN[name]).validate_python(value, strict=True)
            return True
    return not types


def _named(types: tuple[str, ...]) -> str:
    return " or ".join("null" if name == "NoneType" else name for name in types)
