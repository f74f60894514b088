"""Isolation for Hugging Face and TRL trainers: ``callbacks=[EPICallback()]``, and nothing else changes."""

from __future__ import annotations

import functools
import glob
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epi_ds.api import attach
from epi_ds.checkpoint.catalog import INCOMPLETE, remove
from epi_ds.checkpoint.manifest import Manifest
from epi_ds.checkpoint.run import run_id_of
from epi_ds.checkpoint.trainer_folder import commit_trainer_folder, set_aside_incomplete
from epi_ds.checkpoint.verdict import on_first_rank
from epi_ds.choices import Memory
from epi_ds.combinations import combination_problems
from epi_ds.config import SECTION, EPIConfig, parse_config
from epi_ds.errors import UserError, summarize
from epi_ds.planned_rates import planned_rates
from epi_ds.policy_rules import selects_by_steps
from epi_ds.preemption import Preemption
from epi_ds.trackers import continue_runs
from epi_ds.zero3.guard import has_optimizer
from epi_ds.zero3.handle import EPI

logger = logging.getLogger(__name__)


class EPICallback(TrainerCallback):
    """Attaches isolation to the ZeRO-3 engine that the trainer makes.

    The trainer (through accelerate) calls ``deepspeed.initialize`` when training starts and loads a checkpoint right
    after that, before any callback sees the engine. So the callback waits for that one call: the engine is attached the
    moment it exists, and a resumed run gets its importance and masks back with the rest of the checkpoint.
    """

    def __init__(self, config: EPIConfig | Mapping[str, Any] | None = None) -> None:
        """``config`` None reads the ``epi`` section of the trainer's DeepSpeed configuration."""
        self._config = None if config is None else parse_config(config, place="the EPICallback configuration")
        self._engine: Any = None
        self._model: weakref.ref[Any] | None = None
        self._output: Path | None = None
        self._keep_last: int | None = None
        self._save_total_limit: int | None = None
        self._preemption: Preemption | None = None
        self._evaluates_first = False
        self.verified: Path | None = None
        """A checkpoint whose files were read and found whole already, so that resuming from it need not do it again."""
        self.begins_with_mask = False
        """Whether a callback behind this one selects a mask before the first step, however long the run is."""

    @property
    def epi(self) -> EPI:
        """The handle of the attached engine. Raises RuntimeError before training has started."""
        if self._engine is None:
            raise RuntimeError("no engine is attached yet: EPICallback attaches when training starts")
        handle: EPI = self._engine.epi
        return handle

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the configuration and wait for the engine. Raises ValueError for what cannot work."""
        plugin = getattr(args, "deepspeed_plugin", None)
        if plugin is None:
            raise UserError(
                "EPICallback needs DeepSpeed ZeRO-3: pass deepspeed=... to the training arguments, and start the "
                "script with the deepspeed launcher"
            )
        if getattr(args, "enable_jit_checkpoint", False):
            raise UserError(
                "enable_jit_checkpoint has each rank save by itself when it hears SIGTERM, at whatever step it is in; "
                "EPICallback saves on SIGTERM, SIGUSR1 and before a Slurm job's time limit, at a step that all ranks "
                "agree on. Remove it"
            )
        if args.auto_find_batch_size:
            raise UserError(
                "auto_find_batch_size makes a new engine when memory runs out, and what was important to the first "
                "would be lost; set per_device_train_batch_size instead"
            )
        section = plugin.deepspeed_config.get(SECTION)
        if self._config is None and section is None:
            raise UserError(
                f'EPICallback has no configuration: pass one, or add an "{SECTION}" section to the DeepSpeed config'
            )
        if section is not None:
            given, self._config = self._config, parse_config(section)
            if given is not None and given != self._config:
                raise UserError(
                    f'EPICallback was given a configuration, and the "{SECTION}" section of the DeepSpeed '
                    "configuration says something else; keep one of them"
                )
        problems = combination_problems(plugin.deepspeed_config, self._config) if self._config is not None else []
        if problems:
            raise UserError(summarize(problems, place="the DeepSpeed configuration with EPICallback's"))
        self._take_checkpoints_over(args)
        self._model = weakref.ref(kwargs["model"])
        _wait_for_engine(self)

    def _take_checkpoints_over(self, args: TrainingArguments) -> None:
        """Keep the trainer from removing checkpoints before newer ones are whole, and from resuming from half ones."""
        self._output = Path(args.output_dir)
        if args.save_only_model:
            # Nothing to resume from, and the trainer's own way of keeping it.
            return
        if glob.escape(args.output_dir) != args.output_dir:
            raise UserError(
                f"output_dir {args.output_dir!r} has one of * ? [ in it, and transformers looks for what it resumes "
                "from by a pattern: it would find nothing there. Give a name without them"
            )
        config = EPIConfig() if self._config is None else self._config
        # None and numbers below 1 are no limit to the trainer.
        limit, own = args.save_total_limit, config.checkpoint.keep_last
        limit = limit if limit is not None and limit > 0 else None
        if limit is not None and own is not None and limit != own:
            raise UserError(
                f"save_total_limit is {limit} and checkpoint.keep_last is {own}, which mean the same; keep one of them"
            )
        self._keep_last = own if limit is None else limit
        self._save_total_limit, args.save_total_limit = args.save_total_limit, None
        if not dist.is_initialized():
            # Said in words when training begins.
            return
        for folder in on_first_rank(lambda: set_aside_incomplete(Path(args.output_dir))):
            if dist.get_rank() == 0:
                logger.warning("%s was not saved to its end; it is removed once a newer one is whole", folder)
        output = self._folder
        # TensorBoard's folder was decided when the trainer made its own callbacks.
        if trackers := [name for name in args.report_to if name != "tensorboard"]:
            continue_runs(trackers, output, run_id=on_first_rank(lambda: run_id_of(output)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the engine which trains is the attached one, on all ranks, and that a mask will be active.

        Raises RuntimeError where training would silently not be isolated or not be distributed.
        """
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if args.world_size != ranks:
            raise RuntimeError(
                f"the trainer sees {args.world_size} processes and there are {ranks} ranks: every rank would train on "
                "the same rows. Start the script with the deepspeed launcher; on the CPU also build the training "
                "arguments with **epi_ds.train.accelerate_setup.prepare_accelerate()"
            )
        trained = getattr(kwargs["optimizer"], "optimizer", None)
        if self._engine is None or trained is not self._engine.optimizer:
            raise RuntimeError(f"isolation is not attached to what trains: {self._why_not(kwargs['model'])}")
        if not self.begins_with_mask:
            self.epi.check_planned_steps(state.max_steps)
        if args.save_only_model:
            return
        if args.save_strategy != "no":
            # Another job that still saves here is to notice now, and not when this one has saved.
            self._engine.epi.run.occupy(self._folder)
        self._tell_of_audit(args, state)
        self._preemption = Preemption(self._engine)
        if self._preemption.is_due():
            self._preemption.leave()

    def _tell_of_audit(self, args: TrainingArguments, state: TrainerState) -> None:
        """Say how often to save, where an audit would find no two checkpoints under one mask."""
        config = self.epi.config
        interval = config.selection_interval
        if args.save_strategy != "steps" or not selects_by_steps(config) or dist.get_rank() != 0:
            return
        if 2 * state.save_steps > interval >= 2:
            logger.info(
                "epi-ds audit compares two checkpoints of one refresh window; saved every %d steps with a refresh "
                "every %d there may be none. Set save_steps to %d at most where the run is to be audited",
                state.save_steps,
                interval,
                interval // 2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the whole run as one stage for an anchor, where nobody has planned stages."""
        if self.epi.awaits_plan:
            self.epi.plan_stage(planned_rates(kwargs["lr_scheduler"], first_step=0, stop_step=state.max_steps))

    @property
    def _folder(self) -> Path:
        if self._output is None:
            raise RuntimeError("the trainer was not constructed with this callback; pass callbacks=[EPICallback(...)]")
        return self._output

    @property
    def is_stopping(self) -> bool:
        """Whether the ranks have agreed to save after this step and to end. See preemption.py."""
        return self._preemption is not None and bool(self._preemption.cause)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the trainer save and stop where the job is about to end. Collective.

        Not after the last step, from which there is nothing to go on with.
        """
        if self._preemption is not None and state.global_step < state.max_steps and self._preemption.is_due():
            control.should_save = control.should_training_stop = True
            # It may take longer than the job has left.
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do nothing more where the job is about to end: the trainer leaves the epoch, and takes that for its end."""
        if self.is_stopping:
            control.should_save = control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make what the trainer has saved a checkpoint, and remove older ones that are not to be kept. Collective."""
        if args.save_only_model:
            return
        folder = self._folder / f"checkpoint-{state.global_step}"
        # Every rank has written its random states.
        dist.barrier()
        run = self._engine.epi.run
        if run.failed is not None and run.failed.parent == folder:
            # The engine has said why; a folder without weights would only be in the way.
            on_first_rank(lambda: remove(folder))
            return
        # Another job may have begun since the engine saved: the folder is looked at again.
        if run.save(folder, lambda _: on_first_rank(lambda: self._commit(folder))) is not None:
            best = state.best_model_checkpoint
            run.completed(folder, step=self._engine.global_steps, also_keep=() if best is None else (Path(best),))

    def _commit(self, folder: Path) -> Manifest:
        aside = folder.with_name(folder.name + INCOMPLETE)
        if not folder.exists() and aside.exists():
            # By a trainer that was constructed for this folder while this one was saving, and never trained.
            aside.rename(folder)
        return commit_trainer_folder(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the process where the job is about to end, so that nobody takes the run for finished.

        Else say so where memory was asked for and no stage ever ended: nothing was remembered. Raises SystemExit.
        """
        if self._preemption is not None:
            if self.is_stopping:
                self._preemption.leave()
            self._preemption.close()
        if self._save_total_limit is not None:
            # For another trainer with these arguments.
            args.save_total_limit = self._save_total_limit
            if self._save_total_limit == 1 and state.best_model_checkpoint is not None:
                # The trainer does so here too: newest and best were two while it trained.
                self._engine.epi.run.keep_only(Path(state.best_model_checkpoint))
        epi = self.epi
        if epi.config.memory is not Memory.NONE and not epi.stats().counters.finished_stages and dist.get_rank() == 0:
            logger.warning(
                "memory: %s remembered nothing, because no stage was ended; call engine.epi.finish_stage(name) between "
                "two stages, or train stages with epi-ds train",
                epi.config.memory.value,
            )

    def _why_not(self, model: Any) -> str:
        if self._engine is not None:
            return (
                "EPICallback attached to the trainer's first engine, and this is not it; train once, or construct a "
                "new trainer with a new EPICallback"
            )
        if self._model is None:
            return (
                "EPICallback came after the trainer had been constructed; pass callbacks=[EPICallback(...)] to the "
                "constructor instead of calling add_callback"
            )
        if self._model() is not model:
            return (
                "the trainer trains another model than it was constructed with, as model_init makes it do; construct "
                "it with model=... and an EPICallback of its own"
            )
        if self._evaluates_first:
            return (
                "the trainer evaluated before it trained, and keeps the engine without an optimizer that it made for "
                "that. Set eval_on_start=True (with eval_strategy) to evaluate at the start of train(), or evaluate "
                "with a trainer of its own"
            )
        return (
            "the trainer made no DeepSpeed engine of its model for this run; construct a new trainer, and on the CPU "
            "build its arguments with **epi_ds.train.accelerate_setup.prepare_accelerate()"
        )

    def attach_if_awaited(self, engine: Any) -> bool:
        """Attach to ``engine`` if it is the one that trains the trainer's model; return whether it was."""
        if self._model is None or self._model() is not engine.module:
            return False
        if not has_optimizer(engine):
            # Of an evaluation before training. Should the trainer make another one to train, that is waited for.
            self._evaluates_first = True
            return False
        attach(engine, self._config)
        engine.epi.run.trainer_folder, engine.epi.run.verified = self._output, self.verified
        engine.epi.run.keep_last = self._keep_last
        self._engine = engine
        return True


# Callbacks whose trainer has not made its engine yet. They are not kept alive: some trainers never train.
_waiting: weakref.WeakSet[EPICallback] = weakref.WeakSet()


class _Watch:
    """Stands in for ``deepspeed.initialize`` while callbacks wait: attaches an engine to the one that waits for it."""

    def __init__(self, initialize: Any) -> None:
        functools.update_wrapper(self, initialize)
        self._initialize = initialize

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self._initialize(*args, **kwargs)
        for callback in list(_waiting):
            if callback.attach_if_awaited(made[0]):
                _waiting.discard(callback)
        # What others have wrapped around this one meanwhile is theirs to take out.
        if not _waiting and deepspeed.initialize is self:
            deepspeed.initialize = self._initialize
        return made


def _wait_for_engine(callback: EPICallback) -> None:
    _waiting.add(callback)
    if not isinstance(deepspeed.initialize, _Watch):
        deepspeed.initialize = _Watch(deepspeed.initialize)
