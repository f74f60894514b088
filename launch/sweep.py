"""The variants of a run that the tasks of a job array train: seeds, or every combination of some settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from epi_ds.errors import UserError


def variants_of(sweep: Sequence[str], *, output: Path) -> tuple[tuple[str, ...], ...]:
    """Return a recipe's overrides for every combination of values, each with a folder of its own within ``output``.

    sweep  ``key=value,value,...``; several are combined, the last one changing first

    Raises UserError for one that has no values or repeats one.
    """
    if not sweep:
        return ()
    chosen = list(itertools.product(*(_choices(one) for one in sweep)))
    names = [_name(overrides) for overrides in chosen]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--sweep: several tasks would write into {output / repeated.pop()}; give values apart")
    return tuple((*overrides, f"output={output / name}") for overrides, name in zip(chosen, names, strict=True))


def _choices(one: str) -> list[str]:
    key, separator, text = one.partition("=")
    values = text.split(",")
    if not (key and separator and all(values)):
        raise UserError(f"--sweep {one}: must have the form key=value,value,... such as train.seed=0,1,2")
    return [f"{key}={value}" for value in values]


def _name(overrides: Sequence[str]) -> str:
    """Return a folder's name for a combination: ``seed-0``, ``learning_rate-1e-5_ratio-0.01``."""
    pairs = (override.partition("=") for override in overrides)
    # A value may be a path, or hold what shells want to read.
    return "_".join(f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', value)}" for key, _, value in pairs)
