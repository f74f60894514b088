"""The engine's side: isolation state is saved and loaded with the engine's own checkpoints."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from epi_ds.choices import MissingState
from epi_ds.isolation.controller import IsolationController
from epi_ds.zero3.cpu_adam import replay_steps
from epi_ds.zero3.handle import EPI
from epi_ds.zero3.nvme import check_swapped_copies, finish_load, remove_swapped_copies, swapped_weights

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
else:
    # A mixin: the class it is mixed over is the engine's own.
    DeepSpeedEngine = object

logger = logging.getLogger(__name__)


class StateStore(Protocol):
    """Keeps isolation state beside DeepSpeed's files, in the folder of a checkpoint tag. All methods are collective."""

    def discard(self, folder: str) -> None:
        """Make the folder one without isolation state, where there is one; no rank returns before it is."""

    def save(self, folder: str, controller: IsolationController, *, extra: dict[str, Any]) -> None:
        """Write the state. It counts as saved only when every rank has written its part."""

    def verify(self, folder: str, controller: IsolationController) -> bool:
        """Whether there is a state; raises on all ranks alike when it is damaged or belongs to another layout."""

    def load(self, folder: str, controller: IsolationController) -> dict[str, Any]:
        """Replace the controller's state by a verified one; return ``extra`` as it was saved."""


class IsolationEngineMixin(DeepSpeedEngine):
    """Mixed over the class of a DeepSpeed engine; ``epi`` and ``state_store`` are set when the class is assigned."""

    epi: EPI
    state_store: StateStore

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] = {},  # noqa: B006 - DeepSpeed's own signature
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save DeepSpeed's checkpoint and the isolation state in the same tag folder. Collective."""
        tag = str(tag) if tag is not None else f"global_step{self.global_steps}"
        stale = self.optimizer.stale_parameters()
        if stale and dist.get_rank() == 0:
            logger.warning(
                "%s: ZeRO-3 may apply old gradients of %s, which a window did not use, or not in its first or (with "
                "offload) last micro-batch; they are in no checkpoint, so a resume from this one may not be bit-exact",
                tag,
                ", ".join(stale),
            )
        if self.optimizer.has_unsaved_moments and dist.get_rank() == 0:
            logger.warning(
                "%s: DeepSpeed saves no moments of the sub-groups that partial offload (offload_optimizer.ratio) keeps "
                "on the accelerator, so a resume begins them anew and is not bit-exact",
                tag,
            )
        self.optimizer.settle_step_energy()
        # A manifest of an earlier save under this tag must not vouch for files that are being replaced.
        self.state_store.discard(os.path.join(save_dir, tag))
        if self.zero_nvme_offload_optimizer():
            remove_swapped_copies(self, os.path.join(save_dir, tag))
        # `latest` must not name a tag without isolation state, so it is written after that.
        super().save_checkpoint(save_dir, tag, client_state, False, exclude_frozen_parameters)
        extra = {
            "clipping": [average.to_dict() for average in self.optimizer.isolation.clipping],
            # For the audit, which knows no DeepSpeed.
            "swapped": swapped_weights(self.optimizer),
        }
        self.state_store.save(os.path.join(save_dir, tag), self.epi.controller, extra=extra)
        if save_latest and dist.get_rank() == 0:
            with open(os.path.join(save_dir, "latest"), "w") as file:
                file.write(tag)
        dist.barrier()
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, Any]:
        """Load DeepSpeed's checkpoint and the isolation state saved with it. Collective.

        The isolation state is checked before anything is loaded. It is left alone with ``load_module_only`` or
        without ``load_optimizer_states``: such a load begins a new run. NVMe offload refuses it.
        """
        resumes = load_optimizer_states and not load_module_only
        folder = self._tag_folder(load_dir, tag) if resumes else None
        is_swapped = self.zero_nvme_offload_optimizer()
        if is_swapped and not resumes:
            raise RuntimeError(
                "with NVMe offload DeepSpeed loads no weights without optimizer states: it takes those of small "
                "sub-groups from the model as it was made. Load the weights into the model before the engine is made"
            )
        has_state = folder is not None and self._has_state(folder)
        if is_swapped and folder is not None:
            check_swapped_copies(self, folder)
        loaded, client_state = super().load_checkpoint(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        if folder is None or loaded is None:
            return loaded, client_state
        if is_swapped:
            finish_load(self, folder)
        if has_state:
            # The counters of before, and what is not yet in them, are replaced together.
            self.optimizer.settle_step_energy()
            extra = self.state_store.load(folder, self.epi.controller)
            for average, saved in zip(self.optimizer.isolation.clipping, extra["clipping"], strict=True):
                average.restore(saved)
        replay_steps(self.optimizer.optimizer)
        return loaded, client_state

    @staticmethod
    def _tag_folder(load_dir: str, tag: str | None) -> str | None:
        if tag is None:
            latest = os.path.join(load_dir, "latest")
            if not os.path.isfile(latest):
                return None
            with open(latest) as file:
                tag = file.read().strip()
        return os.path.join(load_dir, str(tag))

    def _has_state(self, folder: str) -> bool:
        if self.state_store.verify(folder, self.epi.controller):
            return True
        if self.epi.config.missing_state is MissingState.FRESH:
            if dist.get_rank() == 0:
                logger.warning("%s has no isolation state; importance starts from zero (missing_state: fresh)", folder)
            return False
        raise RuntimeError(
            f"{folder} has no isolation state (epi/manifest.json): it was saved without isolation, or the save did not "
            "finish. Load another tag, or set missing_state: fresh to start with empty importance"
        )
