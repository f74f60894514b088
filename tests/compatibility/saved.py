"""What the committed sets of checkpoints hold, and how they were made: by the releases that wrote them, once.

    python -m tests.compatibility.saved FOLDER

writes a set with the code of now: an engine's tag, a trainer's folder and a recipe's run, each of two ranks and each
with what the uninterrupted run did after it. A new set joins the old ones when a format changes; none is ever written
anew, since a set that follows the code proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from tests.support.engines import ds_config, engine_of, full_importance, full_masks, full_state, train_step
from tests.support.forks import run_module
from tests.support.models import OddNet, odd_batch
from tests.support.processes import checked, run_command
from tests.support.ranks import end_ranks, run_ranks
from tests.support.tags import vouch

RANKS = 2
TAG_STEP, LAST_STEP = 7, 10
# Two finished stages are remembered, a mask is in force, and the counter hash of the rounding has begun.
SECTION: dict[str, Any] = {
    "state": "u16",
    "ratio": 0.2,
    "refresh_interval": 3,
    "ema_decay": 0.9,
    "memory": "per_task",
}
STAGES_END = {2: "first", 5: "second"}
TRAINER_STEP = 4
RECIPE_STEP = 6


class Engine(NamedTuple):
    """What is compared of an engine. Digests are of integers, and so the same on every machine."""

    masks: str
    importance: str
    tasks: list[str]
    losses: list[list[float]]
    """Of this rank, by step."""


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def run_engine(folder: str, *, resume: bool) -> Engine:
    """Train to the last step, from the saved tag or from the beginning, where the tag is saved on the way. Collective.

    Digests are of the state at the tag.
    """
    config = ds_config(epi=SECTION)
    with engine_of(OddNet, config) as engine:
        first_step = 0
        if resume:
            path, _ = engine.load_checkpoint(folder)
            assert path is not None
            first_step = TAG_STEP
        losses, found = [], None
        for step in range(first_step, LAST_STEP):
            if step in STAGES_END:
                engine.epi.finish_stage(STAGES_END[step])
            if step == TAG_STEP:
                if not resume:
                    assert engine.save_checkpoint(folder)
                tasks = sorted(name for name in engine.epi.controller.states if name != "importance")
                found = (
                    _digest(full_masks(engine)),
                    _digest(full_importance(engine)),
                    [_digest(full_state(engine, name)) for name in tasks],
                )
            taken = [float(loss) for loss in train_step(engine, step, odd_batch)]
            if step >= TAG_STEP:
                losses.append(taken)
        assert found is not None
        return Engine(*found, losses)


def recipe_of(base: str) -> dict[str, Any]:
    """Two stages, one of a built-in skill and one of a file; every path is relative to the folder of the set."""
    columns = {"path": "rows.jsonl", "prompt": "question", "completion": "answer"}
    return {
        "model": {"path": base, "dtype": "float32"},
        "stages": [
            {"name": "sums", "data": {"skill": "arithmetic", "rows": 16}, "epochs": 2},
            {
                "name": "rows",
                "data": columns,
                "evaluation": {**columns, "metric": "loss", "rows": 9},
                "moments": "carry",
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
            },
        ],
        "method": {"epi": {"ratio": 0.1, "refresh_interval": 2, "ema_decay": 0.9, "memory": "stage_max"}},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-4,
            "save_steps": 3,
            "max_length": 128,
            "seed": 3,
        },
        "evaluation": {"rows": 8, "batch_size": 4, "max_new_tokens": 8},
        "output": "run",
        "ranks": RANKS,
    }


def lines_after(run: Path, step: int) -> list[dict[str, Any]]:
    """What a recipe's run measured after a step and must measure again: losses, scores, masks."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {
        "step": ("loss", "learning_rate", "isolated"),
        "evaluation": ("scores",),
        "refresh": ("isolated", "budget", "ratio"),
    }
    return [
        {"event": line["event"], "step": line["step"], **{name: line[name] for name in kept[line["event"]]}}
        for line in lines
        if line["step"] > step and line["event"] in kept
    ]


# --- writing a set ---


def _write_base(folder: Path) -> None:
    import torch

    from epi_ds.data.skills import load_tokenizer
    from epi_ds.demo.base_model import small_llama

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = small_llama(
        len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        # So far from uniform that every row has a loss of its own.
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_engine(folder: Path) -> None:
    found = run_ranks(write_engine, RANKS, str(folder / "checkpoints"))
    (folder / "expected.json").write_text(json.dumps([one._asdict() for one in found], indent=1))


def write_engine(folder: str) -> Engine:
    """Runs in ranks."""
    return run_engine(folder, resume=False)


def _write_trainer(folder: Path, base: Path) -> None:
    checked(run_module("tests.end_to_end.plain_sft", str(base), str(folder), num_ranks=RANKS))
    (folder / "result.json").rename(folder / "expected.json")
    shutil.rmtree(folder / f"checkpoint-{2 * TRAINER_STEP}")


def _write_recipe(folder: Path, base: Path) -> None:
    shutil.copytree(base, folder / "base")
    rows = [{"question": f"What comes after {i}?", "answer": f"It is {i + 1}."} for i in range(45)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of("base"), sort_keys=False))
    checked(run_command([str(Path(sys.prefix) / "bin" / "epi-ds"), "train", "recipe.yaml"], cwd=folder))
    (folder / "expected.json").write_text(json.dumps(lines_after(folder / "run", RECIPE_STEP), indent=1))
    for checkpoint in (folder / "run" / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{RECIPE_STEP}":
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "run" / "export")
    (folder / "run" / "report.html").unlink()


def main(folder: Path) -> None:
    """Write a set."""
    folder.mkdir(parents=True)
    # Where it was made is nobody's concern: trainers write paths into their files.
    os.chdir(folder)
    base = Path("base")
    engine, trainer, recipe = Path("engine"), Path("trainer"), Path("recipe")
    for place in (engine, trainer, recipe):
        place.mkdir()
    _write_base(base)
    _write_engine(engine)
    end_ranks()
    _write_trainer(trainer, base)
    _write_recipe(recipe, base)
    shutil.rmtree(base)
    # DeepSpeed's and the trainer's gifts, which no resume reads.
    for gift in (*Path().rglob("zero_to_*.py"), *Path().rglob("README.md")):
        gift.unlink()
    for checkpoint in Path().rglob("checkpoint-*"):
        vouch(checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
