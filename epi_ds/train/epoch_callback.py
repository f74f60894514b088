"""What the trainer does at the end of an epoch it does at the end of every stage's epochs."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from epi_ds.train.trainer import StageTrainer


class EpochCallback(TrainerCallback):
    """Saves and logs at the ends of the stages' epochs. To the trainer a run is one epoch, over the rows in order."""

    def __init__(self, trainer: StageTrainer) -> None:
        self._trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for what is due after the step with the last row of an epoch."""
        if state.global_step not in self._trainer.epoch_ends:
            return
        if args.save_strategy == SaveStrategy.EPOCH:
            control.should_save = True
        if args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save nothing a second time where the trainer's own epoch ends, or is left in the middle to stop."""
        control.should_save = control.should_log = False
