"""How far the layers of a model went between two folders of weights."""

from __future__ import annotations

import math
from pathlib import Path

from epi_ds.errors import UserError
from epi_ds.inspect.model_folder import ModelFolder
from epi_ds.isolation.layout import block_of


def displacement_by_layer(before: Path, after: Path) -> dict[str, float]:
    """Return of every block |after - before| / |before|, Euclidean over its weights. One tensor is read at a time.

    Weights that only one of the folders has are left out. Raises UserError where a folder holds no model or they have
    no weights in common, and CheckpointError where a file is damaged.
    """
    first, second = ModelFolder(before), ModelFolder(after)
    forms = first.forms, second.forms
    names = [name for name, form in forms[0].items() if name in forms[1] and form.shape == forms[1][name].shape]
    if not names:
        raise UserError(f"{before} and {after} have no weights in common; give the folder that training began from")
    went: dict[str, float] = {}
    length: dict[str, float] = {}
    for name in names:
        old, new = (folder.tensor(name).double() for folder in (first, second))
        layer = block_of(name)
        went[layer] = went.get(layer, 0.0) + float((new - old).square().sum())
        length[layer] = length.get(layer, 0.0) + float(old.square().sum())
    return {layer: math.sqrt(went[layer] / length[layer]) for layer in went if length[layer]}
