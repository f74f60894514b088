"""Run a recipe: what every rank does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from datasets import disable_progress_bars as disable_dataset_bars
from rich.console import Console
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars
from trl import SFTConfig

from epi_ds.checkpoint.catalog import Checkpoint
from epi_ds.checkpoint.disk import writing
from epi_ds.checkpoint.durable import write_json
from epi_ds.checkpoint.loading import AUTO
from epi_ds.checkpoint.run import run_id_of
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.config import SECTION
from epi_ds.errors import RemedyError, UserError
from epi_ds.evaluation.evaluator import Evaluator
from epi_ds.evaluation.kept import KeptSource, kept_sources, kept_tasks
from epi_ds.evaluation.tasks import Task, build_tasks
from epi_ds.hf import EPICallback
from epi_ds.launch.environment import accelerator_name
from epi_ds.own_rows.file import written_in
from epi_ds.recipe.advice import advice_on
from epi_ds.recipe.arguments import deepspeed_config
from epi_ds.recipe.models import Recipe
from epi_ds.trackers import continue_runs, trackers_in
from epi_ds.train.accelerate_setup import DEFAULT_TIMEOUT_SECONDS, prepare_accelerate
from epi_ds.train.adapter import export_adapter, with_adapter
from epi_ds.train.epoch_callback import EpochCallback
from epi_ds.train.export import export_model
from epi_ds.train.kept_rows import KeptRows
from epi_ds.train.metrics import BEFORE, MetricsWriter
from epi_ds.train.metrics_callback import MetricsCallback
from epi_ds.train.model import check_vocabulary, load_model, stop_at_the_end_of_a_turn
from epi_ds.train.origins import taken_from_hub
from epi_ds.train.own_rows import write_before_training
from epi_ds.train.progress import ProgressDisplay
from epi_ds.train.refusals import refused_by_libraries
from epi_ds.train.resume import check_data, check_steps, find_resume, marker_of
from epi_ds.train.rows import RowArguments, digests_of, load_tokenizer, prepare_rows, row_arguments_of
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.settings import END, Change, changes_since, end_of
from epi_ds.train.sft_arguments import sft_arguments
from epi_ds.train.stage_callback import StageCallback
from epi_ds.train.start import Start
from epi_ds.train.trainer import StageTrainer

if TYPE_CHECKING:
    # Imports lm-evaluation-harness, which takes a second and an extra.
    from epi_ds.evaluation.harness.harness import Harness

logger = logging.getLogger(__name__)


class _Run(NamedTuple):
    """One start of a run, as its parts see it."""

    recipe: Recipe
    folder: RunFolder
    start: Start
    resume: Checkpoint | None
    """What it continues from."""
    changed: list[Change]
    """Settings that this start changes; on rank 0."""
    metrics: MetricsWriter | None
    """On rank 0, None on the others; so is the console."""
    console: Console | None


def run_recipe(recipe: Recipe, start: Start | None = None) -> RunFolder | None:
    """Train, evaluate and export as the recipe says; continue where its folder has a whole checkpoint.

    Collective: every rank of a launcher calls it. A run that has ended says so, changes nothing and returns None.
    Raises SystemExit where the job was about to end, see preemption.py, and UserError for a stage that is not there,
    and for a run that has ended and was trained with other settings, and what `RunFolder.prepare` raises.
    """
    start = (start or Start()).of(recipe)
    timeout = recipe.train.get("ddp_timeout", DEFAULT_TIMEOUT_SECONDS)
    extra_arguments = prepare_accelerate(timeout_seconds=timeout)
    # One display, ours: the libraries' bars of all ranks would be drawn over each other.
    disable_dataset_bars()
    disable_transformers_bars()
    folder = RunFolder(Path(recipe.output))
    console = Console() if dist.get_rank() == 0 else None
    if start.restart:
        on_first_rank(folder.clear)
    resume = find_resume(recipe, folder, tag=start.resume_from)
    # Who names a checkpoint wants to go on from it.
    if start.resume_from == AUTO and (end := on_first_rank(lambda: end_of(folder, recipe, resume=resume))) is not None:
        if console is not None:
            console.print(end, highlight=False, soft_wrap=True)
        return None
    on_first_rank(folder.prepare)
    changed: list[Change] = []
    metrics: MetricsWriter | None = None

    def begin() -> None:
        nonlocal changed, metrics
        changed = changes_since(folder, recipe) if resume else []
        with writing(folder.recipe):
            write_json(folder.recipe, recipe.model_dump(mode="json"))
        metrics = MetricsWriter(folder.metrics, resume_step=resume.step if resume else None)

    on_first_rank(begin)
    try:
        _continue(_Run(recipe, folder, start, resume, changed, metrics, console), extra_arguments)
    finally:
        if metrics is not None:
            metrics.close()
    return folder


def _continue(run: _Run, extra_arguments: dict[str, Any]) -> None:
    """Train from where the run stands to where this start ends. Collective."""
    folder, until = run.folder, run.start.until
    if trackers := trackers_in(run.recipe.train.get("report_to")):
        continue_runs(trackers, folder.root, run_id=on_first_rank(lambda: run_id_of(folder.checkpoints)))
    if run.console is not None and run.resume is None:
        for advice in advice_on(run.recipe):
            logger.warning("%s", advice)
    # The cheap things first: a wrong column is found before a large model is read.
    tasks = build_tasks(run.recipe)
    harness = _harness_of(run.recipe)
    isolation = EPICallback()
    isolation.verified = run.resume.path if run.resume else None
    keep = run.recipe.method.keep
    isolation.begins_with_mask = keep is not None and keep.importance and not run.recipe.method.epi.warmup_steps
    args = _arguments_of(run, extra_arguments)
    arguments = row_arguments_of(run.recipe)
    tokenizer = load_tokenizer(run.recipe.model, arguments)
    own_rows = write_before_training(
        run.recipe, folder, tokenizer, arguments, resumes=run.resume is not None, console=run.console
    )
    if own_rows is not None and run.metrics is not None and run.resume is None:
        run.metrics.write("own_rows", step=0, stage=BEFORE, **written_in(own_rows)._asdict())
    kept = kept_sources(run.recipe, own_rows)
    tasks = [*kept_tasks(kept, run.recipe), *tasks]
    trainer = _make_trainer(run, isolation, args, tokenizer=tokenizer, arguments=arguments, kept=kept)
    stop_step = next((span.stop_step for span in trainer.spans if span.name == until), None)
    if run.resume is None or stop_step is None or run.resume.step < stop_step:
        _train(run, trainer, isolation, tasks, harness)
    elif run.console is not None:
        run.console.print(f"stage {until} has ended already: {run.resume.path}", highlight=False, soft_wrap=True)
    if until is None:
        if isolation.epi.stats().counters.applied_steps == 0:
            raise RemedyError(
                f"all steps of {folder.root} were skipped, because gradients were not finite: the model has learnt "
                "nothing and is not exported; look at the data and the precision, and lower the learning rate"
            )
        lora = run.recipe.model.lora
        if lora is None:
            export_model(trainer.model_wrapped, trainer.processing_class, folder.export)
        else:
            export_adapter(trainer.model_wrapped, trainer.processing_class, folder.export, merge=lora.merge)
        if run.metrics is not None:
            run.metrics.write(END, step=trainer.spans[-1].stop_step, stage=trainer.spans[-1].name)


def _arguments_of(run: _Run, extra_arguments: dict[str, Any]) -> SFTConfig:
    """Return the trainer's arguments. From then on, transformers has ZeRO-3 partition every model that it loads."""
    recipe = run.recipe
    for precision in ("bf16", "fp16"):
        if recipe.train.get(precision) and accelerator_name() == "cpu":
            raise UserError(
                f"train.{precision}: transformers trains in {precision} on GPUs only, and there is none; remove it"
            )
    # Defaults of the section are left out: accelerate takes any "auto" inside a DeepSpeed configuration for one of its
    # own.
    deepspeed = {**deepspeed_config(recipe.train), SECTION: recipe.method.epi.as_section()}
    with refused_by_libraries():
        return SFTConfig(**{**sft_arguments(recipe, run.folder), **extra_arguments, "deepspeed": deepspeed})


def _make_trainer(
    run: _Run,
    isolation: EPICallback,
    args: SFTConfig,
    *,
    tokenizer: Any,
    arguments: RowArguments,
    kept: Sequence[KeptSource],
) -> StageTrainer:
    recipe = run.recipe
    sources = [source for stage in recipe.stages for source in stage.sources]
    probe = [] if recipe.method.probe is None else [recipe.method.probe]
    keep = recipe.method.keep
    # What is only scored is not trained on.
    used = kept if keep is not None and (keep.importance or keep.replay) else []
    found = prepare_rows([*sources, *used, *probe], arguments, tokenizer)
    if run.resume is not None:
        check_data(run.resume, recipe, digests_of(found))
    # What is learnt of a row stands in its labels; TRL would look for the turns that are no longer there.
    args.assistant_only_loss = False
    # After the arguments: they tell from_pretrained that ZeRO-3 partitions the weights as they are loaded.
    model = load_model(recipe.model)
    if recipe.model.lora is not None:
        model = with_adapter(model, recipe.model.lora, seed=args.seed)
    if arguments.chat_template_path is None:
        check_vocabulary(model, tokenizer, path=recipe.model.path)
    unused = (one.rows for one in found)
    stage_data = [[next(unused) for _ in stage.sources] for stage in recipe.stages]
    kept_rows = None
    if keep is not None:
        kept_rows = KeptRows(keep, tuple(one.source for one in used), tuple(next(unused) for _ in used))
    with refused_by_libraries():
        trainer = StageTrainer(
            stages=recipe.stages,
            stage_data=stage_data,
            probe_steps=recipe.method.epi.probe_steps,
            probe_data=next(unused) if probe else None,
            kept=kept_rows,
            marker=marker_of(recipe, digests_of(found)),
            args=args,
            model=model,
            processing_class=tokenizer,
            callbacks=[isolation],
        )
    if run.resume is not None:
        check_steps(run.resume, trainer.spans, global_batch=trainer.global_batch)
    trainer.remove_callback(PrinterCallback)
    stop_at_the_end_of_a_turn(trainer.model, trainer.processing_class)
    return trainer


def _harness_of(recipe: Recipe) -> Harness | None:
    """Return the tasks of lm-evaluation-harness, loaded; None where none are asked for. Collective."""
    if recipe.evaluation.lm_eval is None:
        return None
    from epi_ds.evaluation.harness.harness import Harness

    return Harness(recipe.evaluation.lm_eval, once=on_first_rank)


def _train(
    run: _Run, trainer: StageTrainer, isolation: EPICallback, tasks: Sequence[Task], harness: Harness | None
) -> None:
    evaluation, resume = run.recipe.evaluation, run.resume
    evaluator = Evaluator(
        trainer,
        tasks,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        weights=evaluation.weights,
        harness=harness,
    )
    if run.console is not None:
        message = f"resuming {resume.path}" if resume else f"starting {run.recipe.output}"
        run.console.print(message, highlight=False, soft_wrap=True)
    first_step = resume.step if resume else 0
    with ProgressDisplay(run.console, total_steps=trainer.spans[-1].stop_step, first_step=first_step) as progress:
        metrics = MetricsCallback(
            trainer,
            isolation=isolation,
            metrics=run.metrics,
            progress=progress,
            changed=run.changed,
            from_hub=taken_from_hub(run.recipe),
        )
        trainer.add_callback(metrics)
        trainer.add_callback(EpochCallback(trainer))
        trainer.add_callback(
            StageCallback(
                trainer,
                isolation=isolation,
                evaluator=evaluator,
                metrics=metrics,
                every=evaluation.every,
                until=run.start.until,
            )
        )
        trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
