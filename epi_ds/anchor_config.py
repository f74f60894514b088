"""The ``anchor`` of the ``epi`` section: what the weights are pulled towards, how strongly, and where it is kept."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from epi_ds.choices import AnchorDevice, AnchorWeight, Pull
from epi_ds.errors import UserError

RUN = "run"
STAGE = "stage"


class AnchorConfig(BaseModel):
    """A pull of all covered entries towards the weights that knew what must be kept. Isolated entries do not move."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    strength: float | None = Field(None, ge=0)
    """How strongly, over a whole stage and without a unit, whatever its length and learning rate: at 0 nothing is
    pulled; at 2, under ``pull: update``, weights end about half as far away as without. What it is divided by is the
    sum of the learning rates that are planned for the stage."""

    decay: float | None = Field(None, ge=0)
    """Instead of ``strength``, where no such sum is known (a loop of one's own, a schedule that depends on a metric):
    the pull per unit of learning rate, as weight decay is given."""

    to: str = RUN
    """``run``: the weights before the run's first step; ``stage``: those before the stage's first; or a folder of
    safetensors with parameters of the model's names, as Hugging Face saves them."""

    weight: AnchorWeight = AnchorWeight.UNIFORM
    """``uniform``: the same for all entries; ``importance``: in proportion to what is remembered of finished stages
    (``memory``), by its root under ``pull: update``; nothing is pulled before there is any."""

    pull: Pull = Pull.UPDATE
    """``update``: after the optimizer's update, weights go a share of the way back (L2-SP, decoupled; any optimizer);
    ``gradient``: a quadratic penalty's gradient is added to the clipped one (EWC; the Adam family)."""

    device: AnchorDevice = AnchorDevice.PARTITION
    """``partition``: beside this rank's weights; ``cpu``: in the host's memory; ``disk``: read anew in every step from
    the folder that ``to`` names."""

    @model_validator(mode="after")
    def _one_of_two(self) -> AnchorConfig:
        if (self.strength is None) == (self.decay is None):
            given = "neither is" if self.strength is None else "both are"
            raise UserError(f"anchor needs strength or decay, and {given} given; set one of them")
        return self

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> AnchorConfig:
        if self.device is AnchorDevice.DISK and self.to in (RUN, STAGE):
            raise UserError(
                f"anchor.device: disk reads the weights from a folder, and anchor.to is {self.to}; set anchor.to to "
                "the folder of the model, or another device"
            )
        return self

    @property
    def is_folder(self) -> bool:
        """Whether the anchor lies in a folder, and not in the weights of the run."""
        return self.to not in (RUN, STAGE)

    @property
    def pulls(self) -> bool:
        """Whether there is any pull."""
        return bool(self.strength or self.decay)
