"""The engine's saves: DeepSpeed's files and the isolation state become one tag, which appears when it is whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from epi_ds.checkpoint.deepspeed_files import tag_name
from epi_ds.checkpoint.meeting import meet
from epi_ds.checkpoint.run import RunRecord
from epi_ds.checkpoint.saving import SaveTimes, TagWriter, check_space
from epi_ds.checkpoint.store import write_state
from epi_ds.errors import UserError
from epi_ds.zero3.handle import EPI
from epi_ds.zero3.persistence.anchor import anchor_states
from epi_ds.zero3.persistence.contents import bytes_to_save, manifest_of
from epi_ds.zero3.persistence.guarded_files import guarded
from epi_ds.zero3.persistence.nvme import copy_swapped_files

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
else:
    # A mixin: the class it is mixed over is the engine's own.
    DeepSpeedEngine = object

logger = logging.getLogger(__name__)


class SavingMixin(DeepSpeedEngine):
    """Saves with the engine's own checkpoints."""

    epi: EPI
    # Within `save_checkpoint` DeepSpeed does not copy swapped files: we do, so that all ranks hear of a failure.
    _epi_hides_nvme = False

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] = {},  # noqa: B006 - DeepSpeed's own signature
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save DeepSpeed's checkpoint and the isolation state as one tag, which appears when all of it is whole.

        Collective. Returns whether it was saved: what cannot be (a full disk, say) is an error in the log and training
        goes on, or, with ``checkpoint.on_failure: stop``, a CheckpointError on all ranks. Raises UserError in the
        middle of an accumulation window, whose gradients are in no checkpoint, and for a tag that is no name,
        CheckpointError where another process has taken the folder over, and LostRankError where a rank does not come.
        """
        tag = str(tag) if tag is not None else tag_name(self.global_steps)
        folder = Path(save_dir)
        if not save_dir or tag == ".." or Path(tag).name != tag:
            raise UserError(f"save_dir {save_dir!r}, tag {tag!r}: give a folder, and a tag that is one name in it")
        self._epi_check_window(tag)
        meet("save_checkpoint")
        self._epi_warn_of_what_is_lost(tag)
        self.optimizer._epi_settle_step_energy()
        path = folder / tag

        def write(record: RunRecord) -> SaveTimes:
            self.epi.run.check_name(path)
            number = self.epi.run.number_in(folder) or 0
            check_space(folder, bytes_to_save(self))
            writer = TagWriter(folder, tag)
            try:
                self._epi_write(writer, client_state, exclude_frozen_parameters)
            except Exception:
                writer.discard()
                raise
            # Another job may have begun meanwhile, and write under the same name.
            self.epi.run.occupy(self.epi.run.home_of(path))
            return writer.commit(lambda files: manifest_of(self, files, record, number=number), save_latest=save_latest)

        times = self.epi.run.save(path, write)
        if times is None:
            return False
        self.epi.run.last_save = times
        # Under a trainer its checkpoint is not yet whole; the callback says when.
        if self.epi.run.trainer_folder is None:
            self.epi.run.completed(path, step=self.global_steps)
        return True

    def _epi_check_window(self, tag: str) -> None:
        self.optimizer._epi_context.window.check_closed(
            tag, because="its gradients are in no checkpoint, so a resume would train other weights", remedy="save"
        )

    def _epi_warn_of_what_is_lost(self, tag: str) -> None:
        if dist.get_rank() != 0:
            return
        stale = self.optimizer._epi_stale_parameters()
        if stale:
            logger.warning(
                "%s: ZeRO-3 may apply old gradients of %s, which a window did not use, or not in its first or (with "
                "offload) last micro-batch; they are in no checkpoint, so a resume from this one may not be bit-exact",
                tag,
                ", ".join(stale),
            )
        if self.optimizer._epi_has_unsaved_moments:
            logger.warning(
                "%s: DeepSpeed saves no moments of the sub-groups that partial offload (offload_optimizer.ratio) keeps "
                "on the accelerator, so a resume begins them anew and is not bit-exact",
                tag,
            )

    def _epi_write(self, writer: TagWriter, client_state: dict[str, Any], exclude_frozen_parameters: bool) -> None:
        """Let DeepSpeed write its files, and write ours beside them."""
        self._epi_hides_nvme = True
        try:
            with guarded(self, writer):
                super().save_checkpoint(
                    str(writer.folder.parent), writer.temporary_tag, client_state, False, exclude_frozen_parameters
                )
        finally:
            self._epi_hides_nvme = False
        if self.zero_nvme_offload_optimizer():
            copy_swapped_files(self, writer)
        write_state(writer, self.epi.controller, anchor_states(self.optimizer._epi_context.anchor))

    def _copy_recovery_script(self, save_path: str) -> None:
        """Keep a convenience from ending a save: where it cannot be copied, rank 0 alone would raise."""
        try:
            super()._copy_recovery_script(save_path)
        except OSError as error:
            logger.warning("DeepSpeed's zero_to_fp32.py could not be put into %s: %s", save_path, error)

    def zero_nvme_offload_optimizer(self) -> bool:
        """Whether optimizer states are on NVMe, as far as DeepSpeed's own save is to know; see `_epi_hides_nvme`."""
        return not self._epi_hides_nvme and bool(super().zero_nvme_offload_optimizer())
