"""Run a recipe: what every rank does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from datasets import disable_progress_bars as disable_dataset_bars
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars
from trl import SFTConfig

from epi_ds.checkpoint.catalog import Checkpoint
from epi_ds.checkpoint.durable import write_json
from epi_ds.checkpoint.loading import AUTO
from epi_ds.checkpoint.run import run_id_of
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.config import SECTION
from epi_ds.errors import UserError, nearest
from epi_ds.evaluation.evaluator import Evaluator
from epi_ds.evaluation.tasks import Task, build_tasks, load_conversations
from epi_ds.hf import EPICallback
from epi_ds.launch.environment import accelerator_name
from epi_ds.recipe.arguments import deepspeed_config
from epi_ds.recipe.models import DataSource, Recipe
from epi_ds.trackers import continue_runs
from epi_ds.train.accelerate_setup import DEFAULT_TIMEOUT_SECONDS, prepare_accelerate
from epi_ds.train.callbacks import RunCallback
from epi_ds.train.export import export_model
from epi_ds.train.metrics import MetricsWriter
from epi_ds.train.progress import ProgressDisplay
from epi_ds.train.resume import DEFAULT_ARGUMENTS, find_resume, marker_of
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.settings import END, Change, changes_since, end_of
from epi_ds.train.trainer import StageTrainer, to_dataset


def run_recipe(
    recipe: Recipe, *, restart: bool = False, resume_from: str = AUTO, until: str | None = None
) -> RunFolder | None:
    """Train, evaluate and export as the recipe says; continue where its folder has a whole checkpoint.

    Collective: every rank of a launcher calls it. A run that has ended says so, changes nothing and returns None.

    restart      throw away what the folder holds
    resume_from  see `find_resume`
    until        the stage after which to save and stop; None for the last one, after which the model is exported

    Raises SystemExit where the job was about to end, see preemption.py, and UserError for a stage that is not there,
    and for a run that has ended and was trained with other settings.
    """
    if until is not None and until not in (names := [stage.name for stage in recipe.stages]):
        raise UserError(f"--until {until}: the recipe has no such stage{nearest(until, names)}; {', '.join(names)}")
    if until == recipe.stages[-1].name:
        until = None
    timeout = recipe.train.get("ddp_timeout", DEFAULT_TIMEOUT_SECONDS)
    extra_arguments = prepare_accelerate(timeout_seconds=timeout)
    # One display, ours: the libraries' bars of all ranks would be drawn over each other.
    disable_dataset_bars()
    disable_transformers_bars()
    folder = RunFolder(Path(recipe.output))
    is_writer = dist.get_rank() == 0
    if restart:
        on_first_rank(folder.clear)
    console = Console() if is_writer else None
    resume = find_resume(recipe, folder, tag=resume_from)
    # Who names a checkpoint wants to go on from it.
    if resume_from == AUTO and (end := on_first_rank(lambda: end_of(folder, recipe, resume=resume))) is not None:
        if console is not None:
            console.print(end, highlight=False, soft_wrap=True)
        return None
    metrics = None
    changed: list[Change] = []
    if is_writer:
        changed = changes_since(folder, recipe) if resume else []
        folder.root.mkdir(parents=True, exist_ok=True)
        write_json(folder.recipe, recipe.model_dump(mode="json"))
        metrics = MetricsWriter(folder.metrics, resume_step=resume.step if resume else None)
    try:
        if trackers := _trackers_of(recipe):
            continue_runs(trackers, folder.root, run_id=on_first_rank(lambda: run_id_of(folder.checkpoints)))
        tasks = build_tasks(recipe)
        isolation = EPICallback()
        isolation.verified = resume.path if resume else None
        trainer = _make_trainer(recipe, folder, isolation, extra_arguments)
        stop_step = next((span.stop_step for span in trainer.spans if span.name == until), None)
        if resume is None or stop_step is None or resume.step < stop_step:
            _train(
                recipe,
                trainer,
                isolation,
                tasks,
                metrics=metrics,
                changed=changed,
                console=console,
                resume=resume,
                until=until,
            )
        elif console is not None:
            console.print(f"stage {until} has ended already: {resume.path}", highlight=False)
        if until is None:
            export_model(trainer.model_wrapped, trainer.processing_class, folder.export)
            if metrics is not None:
                metrics.write(END, step=trainer.spans[-1].stop_step, stage=trainer.spans[-1].name)
    finally:
        if metrics is not None:
            metrics.close()
    return folder


def _trackers_of(recipe: Recipe) -> list[str]:
    given = recipe.train.get("report_to", "none")
    return [name for name in ([given] if isinstance(given, str) else given) if name != "none"]


def _make_trainer(
    recipe: Recipe, folder: RunFolder, isolation: EPICallback, extra_arguments: dict[str, Any]
) -> StageTrainer:
    if recipe.train.get("bf16") and accelerator_name() == "cpu":
        raise UserError("train.bf16: transformers trains in bf16 on GPUs only, and there is none; remove it")
    # Defaults of the section are left out: accelerate takes any "auto" inside a DeepSpeed configuration for one of its
    # own.
    section = recipe.method.epi.model_dump(mode="json", exclude_defaults=True)
    args = SFTConfig(
        **{
            **DEFAULT_ARGUMENTS,
            **recipe.train,
            **extra_arguments,
            "output_dir": str(folder.checkpoints),
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "eval_strategy": "no",
            "deepspeed": {**deepspeed_config(recipe.train), SECTION: section},
        }
    )
    # The cheap things first: a wrong column is found before a large model is read.
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, revision=recipe.model.revision)
    if tokenizer.chat_template is None and args.chat_template_path is None:
        raise UserError(
            f"{recipe.model.path} has no chat template, so conversations cannot be written as text; set "
            "train.chat_template_path to a template file or to a model that has one"
        )

    def dataset_of(source: DataSource) -> Dataset:
        rows = load_conversations(source, seed=args.seed)
        return to_dataset(rows, assistant_only_loss=args.assistant_only_loss)

    stage_data = [dataset_of(stage.data) for stage in recipe.stages]
    probe_data = dataset_of(recipe.method.probe) if recipe.method.probe is not None else None
    # After the arguments: they tell from_pretrained that ZeRO-3 partitions the weights as they are loaded.
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.path,
        dtype=recipe.model.dtype,
        revision=recipe.model.revision,
        **({"attn_implementation": a} if (a := recipe.model.attn_implementation) else {}),
    )
    trainer = StageTrainer(
        stages=recipe.stages,
        stage_data=stage_data,
        probe_data=probe_data,
        marker=marker_of(recipe),
        args=args,
        model=model,
        processing_class=tokenizer,
        callbacks=[isolation],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(
    recipe: Recipe,
    trainer: StageTrainer,
    isolation: EPICallback,
    tasks: Sequence[Task],
    *,
    metrics: MetricsWriter | None,
    changed: Sequence[Change],
    console: Console | None,
    resume: Checkpoint | None,
    until: str | None,
) -> None:
    evaluator = Evaluator(
        trainer,
        tasks,
        batch_size=recipe.evaluation.batch_size,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        weights=recipe.evaluation.weights,
    )
    if console is not None:
        console.print(f"resuming {resume.path}" if resume else f"starting {recipe.output}", highlight=False)
    first_step = resume.step if resume else 0
    with ProgressDisplay(console, total_steps=trainer.spans[-1].stop_step, first_step=first_step) as progress:
        callback = RunCallback(
            trainer,
            isolation=isolation,
            evaluator=evaluator,
            metrics=metrics,
            changed=changed,
            progress=progress,
            until=until,
        )
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
