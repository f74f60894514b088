"""A recipe for a model and rows that were looked at: sizes by arithmetic, and one commented page of YAML."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from typing import NamedTuple

from epi_ds.data.formats import Format
from epi_ds.errors import UserError
from epi_ds.recipe.document import read_yaml

_TEMPLATE = files("epi_ds.launch") / "templates" / "recipe.yaml"
# Rows of a step, where there are enough: rows of an epoch then make this many steps at least.
_GLOBAL_BATCH, _LEAST_STEPS = 32, 16
# Rows of a device's batch at train.max_length 1024, by the most parameters, on devices of 80 GB.
_MICRO_BATCHES = ((3e9, 8), (14e9, 4), (40e9, 2), (math.inf, 1))
# Held out: one row in so many, and at most so many; of fewer than that many rows none.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 10, 200
# From so many rows on, one epoch.
_MANY_ROWS = 20_000
# Weights and gradients in bf16, the optimizer's three in fp32, and an anchor in bf16.
_BYTES_PER_PARAMETER = 18


class ModelFacts(NamedTuple):
    """What a model is found to be."""

    path: str
    num_parameters: int
    has_template: bool
    """Whether its tokenizer has a chat template."""


class DataFacts(NamedTuple):
    """What a table of rows is found to be."""

    path: str
    format: Format
    num_rows: int
    """All rows, which splits count."""
    num_left_out: int
    """Those of them that cannot be trained on."""

    @property
    def name(self) -> str:
        """A name for a stage that trains on it."""
        return re.sub(r"[^A-Za-z0-9_-]+", "_", self.path.rpartition("/")[2].partition(".")[0]) or "rows"


class Draft(NamedTuple):
    """What a recipe is written for."""

    model: ModelFacts
    data: DataFacts
    name: str
    """Of the stage, and of the run's folder in ``runs``."""
    num_gpus: int
    """0 trains on the CPU, in one rank."""
    keep: DataFacts | None
    """Old rows to replay; without, the model writes some itself."""
    template: str | None
    """A file or a model that the chat template comes from; None for the model's own."""


class Sizes(NamedTuple):
    """How the rows of a draft are dealt out."""

    held_out: int
    epochs: int
    micro_batch: int
    """Rows of a rank's batch."""
    accumulation: int
    num_ranks: int
    num_steps: int
    """Of all epochs, without what is replayed."""

    @property
    def global_batch(self) -> int:
        """Rows of a step."""
        return self.micro_batch * self.accumulation * self.num_ranks

    @property
    def save_steps(self) -> int:
        """Steps from one checkpoint to the next."""
        return max(1, min(250, self.num_steps // 4))


def sizes_of(draft: Draft) -> Sizes:
    """Return how the rows are dealt out. Raises UserError for fewer GPUs than none, and for fewer rows than ranks."""
    if draft.num_gpus < 0:
        raise UserError(f"--gpus {draft.num_gpus}: give how many GPUs will train, or 0 for the CPU")
    rows, ranks = draft.data.num_rows, draft.num_gpus or 1
    held_out = min(rows // _HELD_OUT_SHARE, _MOST_HELD_OUT)
    # Where the rows that are left out lie is not looked at: at worst, all of them among those that are trained.
    trained = rows - held_out - draft.data.num_left_out
    if trained < ranks:
        raise UserError(
            f"{draft.data.path} has {trained} rows to train on, beside {held_out} that are held out, and a step takes "
            f"one for each of {ranks} GPUs; give more rows, or a smaller --gpus"
        )
    wanted = min(_GLOBAL_BATCH, max(1, trained // _LEAST_STEPS))
    most = next(size for parameters, size in _MICRO_BATCHES if draft.model.num_parameters < parameters)
    micro_batch = min(most, max(1, wanted // ranks))
    accumulation = max(1, wanted // (micro_batch * ranks))
    epochs = 1 if rows >= _MANY_ROWS else 3
    return Sizes(
        held_out=held_out,
        epochs=epochs,
        micro_batch=micro_batch,
        accumulation=accumulation,
        num_ranks=ranks,
        num_steps=trained * epochs // (micro_batch * accumulation * ranks),
    )


def recipe_text(draft: Draft, sizes: Sizes) -> str:
    """Return the recipe as a commented page of YAML, which `load_recipe` reads."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"scalar": _scalar, "one_line": lambda text: " ".join(text.split())}
    gpus = draft.num_gpus
    return environment.from_string(_TEMPLATE.read_text()).render(
        draft=draft,
        sizes=sizes,
        devices="the CPU" if not gpus else "1 GPU" if gpus == 1 else f"{gpus} GPUs",
        parameters=f"{draft.model.num_parameters:,}".replace(",", " "),
        gigabytes=f"{draft.model.num_parameters * _BYTES_PER_PARAMETER / max(gpus, 1) / 1e9:.1f}",
    )


def _scalar(text: str) -> str:
    """Return a text as YAML has it, in quotes where it would be read as something else."""
    is_plain = re.fullmatch(r"[\w./-]+", text, re.ASCII) is not None and read_yaml(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)
