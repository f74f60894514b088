"""The run that faults are done to. Runs inside ranks, and is imported in the process that they are forked from: nothing
here may start a thread when it is imported.
"""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import epi_ds
from epi_ds.errors import CheckpointError, UserError
from tests.faults.points import PointName, kill_at
from tests.support.engines import collected_logs, ds_config
from tests.support.models import odd_batch
from tests.support.processes_of_engines import another_process

SECTION: dict[str, Any] = {"ratio": 0.2, "refresh_interval": 3, "ema_decay": 0.9, "state": "u16"}
# Tags are saved after these steps; a fault happens to the last one, or while another one is saved after it.
SAVED = (3, 4)
FAULT_STEP = 5
CONTINUED = 5


class Net(nn.Module):
    """Dropout, odd sizes, a bias of one entry: empty partitions from two ranks on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 13)
        self.blocks = nn.ModuleList(nn.Linear(13, 13) for _ in range(2))
        self.head = nn.Linear(13, 1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + self.dropout(torch.tanh(block(hidden)))
        return ((self.head(hidden).squeeze(-1) - target) ** 2).mean()


def make_engine(section: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    engine, *_ = epi_ds.initialize(model=Net(), config=ds_config(epi=SECTION | section))
    # Every rank drops other entries.
    torch.manual_seed(dist.get_rank())
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """Take steps; return this rank's losses."""
    losses = []
    for step in range(first, last):
        loss = engine(*odd_batch(step, dist.get_rank(), 0))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def undisturbed(folder: str | None) -> list[float]:
    """Train from the start to the end of all that is compared; save on the way where there is a folder."""
    engine = make_engine({})
    losses: list[float] = []
    for step in range(FAULT_STEP + 1 + CONTINUED):
        losses += train(engine, step, step + 1)
        if folder is not None and step + 1 in SAVED:
            assert engine.save_checkpoint(folder)
    return losses


class Resumed(NamedTuple):
    """What a restart came to."""

    step: int
    """Where it continued; -1 where it was refused."""
    losses: list[float]
    error: str
    logged: str


def resume(folder: str, section: dict[str, Any], tag: str | None) -> Resumed:
    """Start again as a user's script does: load what there is, and train on."""
    with collected_logs() as messages:
        try:
            engine = make_engine(section)
            engine.load_checkpoint(folder, tag)
            step = engine.global_steps
            losses = train(engine, step, step + CONTINUED)
            # Saving goes on where the fault happened.
            if not engine.save_checkpoint(folder):
                return Resumed(-1, [], "a save after the restart failed: " + "\n".join(messages), "")
            return Resumed(step, losses, "", "\n".join(messages))
        except (CheckpointError, UserError) as error:
            return Resumed(-1, [], str(error), "\n".join(messages))


def die_while_saving(folder: str, rank: int, point: PointName) -> str:
    """Continue from the newest tag, and have one rank killed at a point of the next save."""
    engine = make_engine({})
    engine.load_checkpoint(folder)
    train(engine, engine.global_steps, FAULT_STEP)
    if dist.get_rank() == rank:
        kill_at(point)
    engine.save_checkpoint(folder)
    dist.barrier()
    return "the save ended"


def die_while_training(folder: str, rank: int, signal_number: int) -> str:
    """Have one rank killed, or stopped, in the middle of a step."""
    engine = make_engine({})
    engine.load_checkpoint(folder)
    loss = engine(*odd_batch(4, dist.get_rank(), 0))
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal_number)
    engine.backward(loss)
    engine.step()
    dist.barrier()
    return "the step ended"


def save_on(folder: str, section: dict[str, Any]) -> str:
    """Continue from the newest tag and save: on a full or read-only disk. Return what is said, or ''."""
    with collected_logs() as messages:
        try:
            engine = make_engine(section)
            engine.load_checkpoint(folder)
            train(engine, engine.global_steps, FAULT_STEP)
            saved = engine.save_checkpoint(folder)
            # Training goes on, whatever became of the save.
            train(engine, FAULT_STEP, FAULT_STEP + 1)
            return "" if saved else "\n".join(text for text in messages if "was not saved" in text)
        except CheckpointError as error:
            return f"stopped: {error}"


def two_jobs(folder: str) -> str:
    """A second job takes the folder over; return what the first one says at its next save."""
    first, second = make_engine({}), make_engine({})
    for engine, process in ((first, nullcontext()), (second, another_process())):
        with process:
            engine.load_checkpoint(folder)
            train(engine, engine.global_steps, FAULT_STEP)
            assert engine.save_checkpoint(folder)
    try:
        first.save_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def _preload() -> None:
    """Do once, in the process that ranks are forked from, what takes seconds in each of them."""
    from deepspeed.ops.op_builder import FusedAdamBuilder, ShareMemCommBuilder

    for module in ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.adam", "epi_ds.api"):
        importlib.import_module(module)
    for builder in (FusedAdamBuilder(), ShareMemCommBuilder()):
        builder.load(verbose=False)


_preload()
