"""``EPICallback`` in a script that knows TRL and nothing else of ours."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import epi_ds
from epi_ds import ds_configs
from epi_ds.checkpoint.catalog import open_checkpoint
from epi_ds.train.accelerate_setup import prepare_accelerate
from tests.support.engines import ds_config
from tests.support.forks import run_module
from tests.support.processes import checked
from tests.support.ranks import end_ranks, run_ranks

pytestmark = pytest.mark.end_to_end

SCRIPT = "tests.end_to_end.plain_sft"


@pytest.mark.slow
def test_a_plain_script_isolates_and_resumes_to_the_bit(small_base: Path, plain_script: Path, tmp_path: Path) -> None:
    model, whole, resumed = str(small_base), plain_script, tmp_path / "resumed"
    resumed.mkdir()
    checked(run_module(SCRIPT, model, str(resumed), str(whole / "checkpoint-4"), num_ranks=2))
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (whole, resumed))
    assert first["world_size"] == 2
    assert first["isolated"] > 0
    # The resumed log begins with what the checkpoint had logged.
    assert first == second
    assert len(first["losses"]) == first["applied_steps"] == 8

    # A save that was killed after the tag was whole, and before the trainer had written its own state.
    shutil.rmtree(resumed)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-8" / "epi")
    (resumed / "checkpoint-8" / "trainer_state.json").unlink()
    output = checked(run_module(SCRIPT, model, str(resumed), "--continue", num_ranks=2))
    assert "checkpoint-8.incomplete was not saved to its end" in output
    assert json.loads((resumed / "result.json").read_text()) == first
    # The older one went when the newer one was whole, and the half one with it.
    assert [path.name for path in resumed.glob("checkpoint-*")] == ["checkpoint-8"]
    assert open_checkpoint(resumed / "checkpoint-8").problem is None


@pytest.mark.slow
def test_ranks_that_would_train_on_the_same_rows_are_refused(small_base: Path, tmp_path: Path) -> None:
    """What a plain script does on the CPU when accelerate is not told of the ranks."""
    finished = run_module(SCRIPT, str(small_base), str(tmp_path / "run"), "--unprepared", num_ranks=2)
    assert finished.exit_code != 0
    assert "every rank would train on the same rows" in finished.output
    assert "prepare_accelerate()" in finished.output


# --- a trainer's ways to end up with another engine than the callback's ---

SECTION = {"ratio": 0.2, "refresh_interval": 1}


def tiny_model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def trainer_of(folder: str, isolation: Any, *, stage: int = 3, epi: Any = None, **changes: Any) -> Trainer:
    """A trainer for two steps, over a model of its own unless ``changes`` has one or a model_init."""
    config = {**ds_configs.load("zero3"), "zero_optimization": {"stage": stage}}
    if epi is not None:
        config["epi"] = epi
    arguments = changes.pop("arguments", {})
    # New arguments do this by themselves, unless told to use the state that is configured.
    AcceleratorState._reset_state()
    args = TrainingArguments(
        output_dir=folder,
        report_to="none",
        disable_tqdm=True,
        deepspeed=config,
        **prepare_accelerate(),
        **{"max_steps": 2, "save_strategy": "no", **arguments},
    )
    if "model_init" not in changes:
        changes.setdefault("model", tiny_model())
    rows = [{"input_ids": [row % 17] * 6, "labels": [row % 17] * 6} for row in range(64)]
    return Trainer(args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=isolation, **changes)


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_two_trainers(folder: str) -> None:
    """Both made before either trains, and one that never does; what others wrap around DeepSpeed stays in place."""
    first, second = epi_ds.EPICallback(), epi_ds.EPICallback(SECTION)
    plain, calls = deepspeed.initialize, []

    def of_another_library(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return plain(*args, **kwargs)

    deepspeed.initialize = of_another_library
    try:
        trainers = [trainer_of(folder, [first], epi={"allow_inactive": True}), trainer_of(folder, [second])]
        trainer_of(folder, [epi_ds.EPICallback(SECTION)])
        gc.collect()
        # Neither stands in the way of epi_ds.initialize, which looks for the configuration among its arguments.
        engine, *_ = epi_ds.initialize(None, tiny_model(), config=ds_config(epi=SECTION))
        assert engine.epi.config.ratio == 0.2
        engine.destroy()
        for trainer in reversed(trainers):
            trainer.train()
        assert first.epi.config.refresh_interval == 500
        assert second.epi.stats().isolated > 0
        assert len(calls) == 3
        assert deepspeed.initialize is of_another_library
    finally:
        deepspeed.initialize = plain


def refusals(folder: str) -> dict[str, str]:
    found = {}
    again = epi_ds.EPICallback(SECTION)
    trainer = trainer_of(folder, [again])
    trainer.train()
    # What a retry after running out of memory does: the same model in an engine that is new.
    trainer.model_wrapped = trainer.model
    found["second engine"] = message_of(trainer.train)
    found["empty section"] = message_of(lambda: trainer_of(folder, [epi_ds.EPICallback()], epi={}).train())
    found["model_init"] = message_of(
        lambda: trainer_of(folder, [epi_ds.EPICallback(SECTION)], model_init=tiny_model).train()
    )
    late = trainer_of(folder, [])
    late.add_callback(epi_ds.EPICallback(SECTION))
    found["add_callback"] = message_of(late.train)
    found["stage 2"] = message_of(lambda: trainer_of(folder, [epi_ds.EPICallback(SECTION)], stage=2).train())
    found["auto_find_batch_size"] = message_of(
        lambda: trainer_of(folder, [epi_ds.EPICallback(SECTION)], stage=2, arguments={"auto_find_batch_size": True})
    )
    evaluated = trainer_of(folder, [epi_ds.EPICallback(SECTION)])
    evaluated.evaluate()
    found["evaluate first"] = message_of(evaluated.train)
    # The remedy that it names.
    arguments = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 9}
    isolation = epi_ds.EPICallback(SECTION)
    trainer_of(folder, [isolation], arguments=arguments).train()
    assert isolation.epi.stats().isolated > 0
    found["pattern"] = message_of(lambda: trainer_of(f"{folder}/run[1]", [epi_ds.EPICallback(SECTION)]))
    return found


# Score of the evaluation after every step: the best is the second, and the newest is another one.
SCORES = (1.0, 3.0, 2.0, 0.0)


class Scores(TrainerCallback):
    """Scores every evaluation as `SCORES` says, and notes the checkpoints that were there while it trained."""

    def __init__(self) -> None:
        self.there: list[list[str]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_score"] = SCORES[state.global_step - 1]
        self.there.append(sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*")))


def kept(folder: str, limit: int | None, *, loads_best: bool, isolated: bool) -> tuple[list[list[str]], list[str]]:
    """Return the checkpoints at every evaluation, and those that are left."""
    scores = Scores()
    arguments = {
        "max_steps": len(SCORES),
        **dict.fromkeys(("save_strategy", "eval_strategy"), "steps"),
        **dict.fromkeys(("save_steps", "eval_steps"), 1),
        "save_total_limit": limit,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "load_best_model_at_end": loads_best,
    }
    trainer_of(folder, [*([epi_ds.EPICallback(SECTION)] if isolated else []), scores], arguments=arguments).train()
    return scores.there, sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def check_kept(folder: str) -> None:
    for limit, loads_best in ((1, True), (2, False)):
        found = kept(f"{folder}/{limit}/ours", limit, loads_best=loads_best, isolated=True)
        assert found == kept(f"{folder}/{limit}/plain", limit, loads_best=loads_best, isolated=False), limit
        assert "checkpoint-2" in found[1]
    # No limit to the trainer.
    assert len(kept(f"{folder}/0", 0, loads_best=False, isolated=True)[1]) == len(SCORES)


@pytest.mark.slow
def test_the_best_model_stays_as_it_does_without_isolation(tmp_path: Path) -> None:
    try:
        run_ranks(check_kept, 1, str(tmp_path))
    finally:
        # Accelerate's state is of the process.
        end_ranks(1)


@pytest.mark.slow
def test_a_trainer_without_its_engine_says_why(tmp_path: Path) -> None:
    try:
        run_ranks(check_two_trainers, 1, str(tmp_path))
        (found,) = run_ranks(refusals, 1, str(tmp_path))
    finally:
        # Accelerate's state is of the process.
        end_ranks(1)
    assert "attached to the trainer's first engine, and this is not it" in found["second engine"]
    # The defaults are taken: what is wrong with them in a run of two steps is another matter.
    assert "refresh_interval 500" in found["empty section"]
    assert "model_init" in found["model_init"]
    assert "instead of calling add_callback" in found["add_callback"]
    assert "ZeRO stage is 2" in found["stage 2"]
    assert "set per_device_train_batch_size instead" in found["auto_find_batch_size"]
    assert (
        "keeps the engine without an optimizer that it made for that. Set eval_on_start=True" in found["evaluate first"]
    )
    assert "transformers looks for what it resumes from by a pattern" in found["pattern"]
