"""States of the random generators that a training loop draws from, so that a resumed run draws what the other would."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomStates(NamedTuple):
    """The generators' states of one process. Nothing here is executed when it is read."""

    tensors: dict[str, Tensor]
    """``cpu``, and ``cuda`` where there is a GPU: torch's generators. uint8"""
    others: dict[str, Any]
    """``python`` and ``numpy``, as JSON keeps them."""


def random_states() -> RandomStates:
    """Return the states as they are now. numpy's is the one of its global functions."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    others = {"python": random.getstate(), "numpy": [algorithm, np.asarray(keys).tolist(), *rest]}
    # As it comes back from a file: lists for tuples.
    return RandomStates(tensors, json.loads(json.dumps(others)))


def restore_random_states(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
    """Continue where the saved generators were. Those that the save did not have are left as they are."""
    if "cpu" in tensors:
        torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    if "python" in others:
        version, internal, gauss = others["python"]
        random.setstate((version, tuple(internal), gauss))
    if "numpy" in others:
        algorithm, keys, *rest = others["numpy"]
        np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
