"""The ``checkpoint`` of the ``epi`` section: how a run's checkpoints are kept and read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from epi_ds.choices import OnFailure
from epi_ds.errors import UserError


class CheckpointConfig(BaseModel):
    """How a run's checkpoints are kept and read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_last: int | None = Field(None, ge=1)
    """Complete checkpoints to keep; older ones are removed once a newer one is complete. None keeps all."""

    keep_every: int | None = Field(None, ge=1)
    """With ``keep_last``: keep those of every so many steps for good."""

    on_failure: OnFailure = OnFailure.CONTINUE
    """When a checkpoint cannot be saved (a full disk, say): say so and ``continue`` training, or ``stop`` with an error
    on all ranks. What was saved before is untouched either way."""

    trust: bool = False
    """Read the files of a checkpoint that is not of the run whose folder it lies in. DeepSpeed's are pickles: reading
    them runs whatever their author put there."""

    allow_new_batch_size: bool = False
    """Resume although a step has another number of rows now (micro-batch x accumulation x ranks)."""

    stop_before_end: float = Field(120, ge=0)
    """Seconds before the time limit of a Slurm job at which to save and stop: enough for two steps and a save. 0 leaves
    it to signals."""

    @model_validator(mode="after")
    def _keep_every_is_used(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_last is None:
            raise UserError(
                "keep_every says which of the older checkpoints to keep, and without keep_last all are kept"
            )
        return self
