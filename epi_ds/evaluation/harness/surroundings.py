"""What lm-evaluation-harness does to the process around it, kept to the time in which it works."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import lm_eval.api.task
import numpy as np
from datasets import disable_progress_bars as disable_dataset_bars
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars


def disable_loading_bars() -> None:
    """Draw no bars while rows and weights are read, in this process from now on."""
    disable_dataset_bars()
    disable_transformers_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """Draw no bars, which would be those of all ranks over each other, and leave out warnings.

    Those are addressed to whoever makes tasks: they are shown when tasks are loaded, and not at every evaluation.
    """
    module, harness_logger = lm_eval.api.task, logging.getLogger("lm_eval")
    level = harness_logger.level
    module.tqdm = partial(tqdm, disable=True)
    harness_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        module.tqdm = tqdm
        harness_logger.setLevel(level)


@contextmanager
def seeded() -> Iterator[None]:
    """Have tasks that shuffle their choices do it alike on all ranks and at every evaluation, by its own seeds."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
