"""``state: adam``: importance is the optimizer's own second moment, in place, and what goes with that."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import epi_ds
from epi_ds.errors import UserError
from tests.support.engines import (
    assert_same,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_moments,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, decay_groups_with_own_betas, odd_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

SECTION = {"state": "adam", "apply": "update", "ratio": 0.2, "refresh_interval": 2}


def torch_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.97))


def check_reads_in_place(optimizer: str) -> list[str]:
    """Importance is ``exp_avg_sq``, nothing is kept beside it, and isolated entries hold; return what was logged."""
    config = ds_config(epi=SECTION, offload=optimizer == "DeepSpeedCPUAdam", accumulation=2)
    kwargs: dict[str, Any] = {}
    if optimizer == "AdamW":
        del config["optimizer"]
        config["zero_allow_untested_optimizer"] = True
        kwargs["optimizer"] = torch_adamw
    elif optimizer == "FusedAdam":
        kwargs["model_parameters"] = decay_groups_with_own_betas
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("epi_ds")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with engine_of(OddNet, config, **kwargs) as engine:
            assert type(engine.optimizer.optimizer).__name__ == optimizer
            assert not any(values.any() for values in full_importance(engine).values())
            for step in range(5):
                before, masks = full_weights(engine), full_masks(engine)
                train_step(engine, step, odd_batch)
                after = full_weights(engine)
                for name, mask in masks.items():
                    assert torch.equal(before[name][mask], after[name][mask]), name
            assert sum(int(mask.sum()) for mask in masks.values()) > 0
            moments = {n.removesuffix("/exp_avg_sq"): v for n, v in full_moments(engine).items() if "_sq" in n}
            assert_same(full_importance(engine), moments)
            assert set(engine.epi.memory_report().state_bytes) == {"masks", "first_mask"}
            with pytest.raises(UserError, match="would forget it"):
                engine.epi.reset_optimizer_state()
            with pytest.raises(UserError, match="for a probe to measure"):
                engine.epi.probe([])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return messages


@pytest.mark.parametrize(
    ("optimizer", "beta2"), [("FusedAdam", "0.95, 0.99"), ("DeepSpeedCPUAdam", "0.99"), ("AdamW", "0.97")]
)
def test_importance_is_adams_second_moment(optimizer: str, beta2: str) -> None:
    messages = run_ranks(check_reads_in_place, 2, optimizer)[0]
    assert f"importance is Adam's exp_avg_sq, so its effective ema_decay is beta2: {beta2}" in messages


def check_resume(folder: str) -> None:
    with engine_of(OddNet, ds_config(epi=SECTION)) as engine:
        for step in range(3):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder, "tag")
        for step in range(3, 6):
            train_step(engine, step, odd_batch)
        weights, masks = full_weights(engine), full_masks(engine)
    with engine_of(OddNet, ds_config(epi=SECTION)) as engine:
        engine.load_checkpoint(folder, "tag")
        for step in range(3, 6):
            train_step(engine, step, odd_batch)
        assert_same(full_weights(engine), weights)
        for name, mask in full_masks(engine).items():
            assert torch.equal(mask, masks[name]), name


def test_a_run_resumes_from_the_moments_of_the_checkpoint(tmp_path: Path) -> None:
    run_ranks(check_resume, 2, str(tmp_path))


def attach_error(optimizer: str) -> str:
    config = ds_config()
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True
    make = {
        "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
        "adam with L2": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1),
    }[optimizer]
    with engine_of(OddNet, config, optimizer=make) as engine:
        try:
            epi_ds.attach(engine, SECTION)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", "SGD keeps none that are averages of squared gradients"),
        ("adam with L2", "second moments measure decay"),
    ],
)
def test_other_optimizers_are_refused(optimizer: str, expected: str) -> None:
    (error,) = run_ranks(attach_error, 1, optimizer)
    assert expected in error
    assert "state: u8" in error
