"""The engine's loads: of any tag, by any number of ranks.

[Note: loads] What there is to load, and whether it may be read, is decided by `epi_ds.checkpoint` before DeepSpeed
sees a file. A tag of the same layout is then loaded by DeepSpeed; of another one, or of which only the weights are
wanted, its shards are read by parameter (resharding.py). DeepSpeed itself loads no weights at all with
``load_module_only`` under ZeRO-3, and those of ``latest`` instead of the tag's without ``load_optimizer_states``.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from epi_ds.checkpoint.catalog import Checkpoint, open_checkpoint
from epi_ds.checkpoint.deepspeed_files import SavedPartitions, is_universal, model_states_file, without_frozen_slices
from epi_ds.checkpoint.loading import AllRanks, choose
from epi_ds.checkpoint.manifest import Manifest
from epi_ds.checkpoint.meeting import meet
from epi_ds.checkpoint.optimizers import overwritten
from epi_ds.checkpoint.store import check_fits, load_state
from epi_ds.checkpoint.tag import Consent, Tag, newest_in, open_tag
from epi_ds.checkpoint.verdict import agree, on_first_rank
from epi_ds.choices import MissingState
from epi_ds.errors import CheckpointError, RemedyError, UserError
from epi_ds.zero3.handle import EPI
from epi_ds.zero3.persistence.anchor import load_anchor
from epi_ds.zero3.persistence.contents import batch_of, sub_groups_of
from epi_ds.zero3.persistence.cpu_adam import replay_steps
from epi_ds.zero3.persistence.nvme import check_swapped_copies, finish_load
from epi_ds.zero3.persistence.optimizers import optimizer_of
from epi_ds.zero3.persistence.resharding import check_parameters, check_states, load_frozen, load_partitions

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
else:
    # A mixin: the class it is mixed over is the engine's own.
    DeepSpeedEngine = object

logger = logging.getLogger(__name__)


class _Found(NamedTuple):
    """What there is to load."""

    checkpoint: Checkpoint
    verified: Path | None
    """A checkpoint whose files were read and found whole, this one or another."""


class LoadingMixin(DeepSpeedEngine):
    """Loads with the engine's own checkpoints. See [Note: loads]."""

    epi: EPI
    # What `_load_zero_checkpoint` reads instead of DeepSpeed's own way, while a load needs it.
    _epi_reader: SavedPartitions | None = None
    _epi_weights_only = False

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
        """Load a checkpoint, whatever number of ranks saved it, and the isolation state in it. Collective.

        tag  a name, ``step:N``, or None or ``auto`` for the newest tag that is whole. A folder without any gives
             ``(None, None)``, as in DeepSpeed; one in which all are damaged is an error, and not step 0

        Everything is verified before anything is read, and every rank raises the same. The isolation state is left
        alone with ``load_module_only`` or without ``load_optimizer_states``: such a load begins a new run from the
        weights. NVMe offload refuses it. UserError in the middle of an accumulation window.
        """
        self.optimizer._epi_context.window.check_closed(
            f"load_checkpoint({str(load_dir)!r})",
            because="its gradients are of the weights before the load, and would be applied to those after it",
            remedy="load",
        )
        meet("load_checkpoint")
        resumes = load_optimizer_states and not load_module_only
        if self.zero_nvme_offload_optimizer() and not resumes:
            raise RemedyError(
                "with NVMe offload DeepSpeed loads no weights without optimizer states: it takes those of small "
                "sub-groups from the model as it was made. Load the weights into the model before the engine is made"
            )
        trust, missing_state = self.epi.config.checkpoint.trust, self.epi.config.missing_state
        consent = Consent(trust, "set checkpoint.trust: true")
        found = self._epi_find(Path(load_dir), tag, accepts_plain=not resumes or missing_state is MissingState.FRESH)
        if found is None:
            if dist.get_rank() == 0:
                logger.warning("%s holds no checkpoint: nothing is loaded", load_dir)
            return None, None
        self._epi_check_format(found.checkpoint)
        arguments = load_module_strict, True, load_lr_scheduler_states, load_module_only, custom_load_fn
        if found.checkpoint.is_plain:
            folder = self._epi_check_plain(found.checkpoint, consent, resumes=resumes)
            return super().load_checkpoint(str(folder.parent), folder.name, *arguments)
        opened = open_tag(found.checkpoint, consent=consent, readers=AllRanks(found.verified))
        same_layout = self._epi_has_layout_of(opened.manifest)
        if resumes:
            agree(lambda: self._epi_check_resumable(opened, same_layout))
            self._epi_tell_overwritten(opened)
        place = str(opened.path.parent), opened.path.name
        reader = None if resumes and same_layout else SavedPartitions(*opened)
        with self._epi_reading(reader, weights_only=not resumes):
            loaded, client_state = super().load_checkpoint(*place, *arguments)
            if load_module_only:
                # DeepSpeed does not come by `_load_zero_checkpoint` then.
                self.optimizer.checkpoint_event_prologue()
                self._load_zero_checkpoint(*place)
                self.optimizer.checkpoint_event_epilogue()
        if resumes:
            self._epi_restore_isolation(opened, same_layout)
        return loaded, client_state

    def _epi_find(self, load_dir: Path, tag: str | None, *, accepts_plain: bool) -> _Found | None:
        """Return what to load; None where nothing was ever saved. Collective."""
        if self.epi.run.trainer_folder is None or not on_first_rank(lambda: _is_trainers(load_dir)):
            choice = choose(load_dir, tag, accepts_plain=accepts_plain, engine=self.epi.run.number_in(load_dir))
            return None if choice is None else _Found(choice.checkpoint, choice.checkpoint.path)
        whole = on_first_rank(lambda: open_checkpoint(load_dir))
        if whole.is_plain and accepts_plain:
            inside = on_first_rank(lambda: newest_in(load_dir))
            if inside.is_plain:
                return _Found(inside, None)
        if whole.problem is not None:
            raise CheckpointError(f"{whole.problem}. Resume from another checkpoint")
        return _Found(whole, self.epi.run.verified)

    def _epi_check_format(self, found: Checkpoint) -> None:
        """Raise UserError where DeepSpeed would read a checkpoint in another format than it has. Collective."""
        universal = on_first_rank(lambda: is_universal(found.path))
        if universal and not self.load_universal_checkpoint():
            raise UserError(str(found.problem))
        if self.load_universal_checkpoint() and not universal:
            raise UserError(
                f"{found.path} is not in DeepSpeed's universal format, and the DeepSpeed configuration has checkpoint."
                "load_universal, which reads nothing else. Remove it: any number of ranks loads what was saved with "
                "isolation"
            )

    def _epi_check_plain(self, found: Checkpoint, consent: Consent, *, resumes: bool) -> Path:
        """Return the folder of a tag that was saved without isolation, where it may be loaded. Collective."""
        if not resumes:
            raise UserError(
                f"{found.path} was saved without isolation, and DeepSpeed by itself loads no weights under ZeRO-3 with "
                "load_module_only, and those of `latest` without load_optimizer_states. Load it whole, with "
                "missing_state: fresh, or make a model of it with the zero_to_fp32.py that lies in it"
            )
        on_first_rank(lambda: consent.check(found))
        if dist.get_rank() == 0:
            logger.warning("%s has no isolation state; importance starts from zero (missing_state: fresh)", found.path)
        return found.path

    def _epi_restore_isolation(self, tag: Tag, same_layout: bool) -> None:
        """Load what DeepSpeed does not: the isolation state, and what is to go on with it. Collective."""
        if self.zero_nvme_offload_optimizer():
            finish_load(self, tag)
        # The counters of before, and what is not yet in them, are replaced together.
        self.optimizer._epi_settle_step_energy()
        load_state(tag, self.epi.controller, same_layout=same_layout)
        load_anchor(self.optimizer._epi_context.anchor, tag, self.epi.controller.layout)
        averages, clipping = self.optimizer._epi_context.clipping, tag.manifest.isolation.extra.clipping
        for average in averages:
            average.reset()
        for average, saved in zip(averages if clipping else (), clipping, strict=True):
            average.restore(saved)
        replay_steps(self.optimizer.optimizer)
        self.epi.run.continues_from(tag.path, step=self.global_steps, engine=tag.manifest.engine)

    def _epi_has_layout_of(self, manifest: Manifest) -> bool:
        return manifest.world_size == batch_of(self).world_size and manifest.sub_groups == sub_groups_of(self.optimizer)

    def _epi_check_resumable(self, tag: Tag, same_layout: bool) -> None:
        """Raise UserError where a tag does not fit this engine, and RemedyError where this process cannot read it."""
        manifest = tag.manifest
        check_fits(
            tag,
            self.epi.controller,
            batch=batch_of(self),
            sub_groups=sub_groups_of(self.optimizer),
            optimizer=optimizer_of(self.optimizer),
            allow_new_batch=self.epi.config.checkpoint.allow_new_batch_size,
        )
        if same_layout:
            if self.zero_nvme_offload_optimizer():
                check_swapped_copies(self, tag.path)
            return
        before = f"{tag.path} was saved by {manifest.world_size} ranks with other partitions"
        if self.zero_nvme_offload_optimizer() or manifest.isolation.extra.swapped:
            raise UserError(
                f"{before}, and the files of NVMe offload can be read by the ranks that wrote them only; resume with "
                f"{manifest.world_size} ranks and the same sub_group_size"
            )
        if self.optimizer._epi_has_unsaved_moments:
            raise UserError(
                f"{before}, and with partial offload (offload_optimizer.ratio) part of the moments is in no "
                f"checkpoint; resume with {manifest.world_size} ranks, or save with ratio 1.0"
            )

    def _epi_tell_overwritten(self, tag: Tag) -> None:
        """Warn of hyper-parameters that this process gave its optimizer, and that the load replaces."""
        changed = overwritten(
            tag.manifest.optimizer, optimizer_of(self.optimizer), scheduled=self.lr_scheduler is not None
        )
        if changed and dist.get_rank() == 0:
            logger.warning(
                "loading %s replaces hyper-parameters of the optimizer: %s. To train with others, set them in its "
                "param_groups after the load",
                tag.path,
                ", ".join(changed),
            )

    @contextmanager
    def _epi_reading(self, reader: SavedPartitions | None, *, weights_only: bool) -> Iterator[None]:
        """Within the context, DeepSpeed's load takes weights and states from ``reader``, where there is one."""
        if reader is not None:
            agree(lambda: check_parameters(self.optimizer, reader))
            if not weights_only:
                agree(lambda: check_states(self.optimizer, reader))
        self._epi_reader, self._epi_weights_only = reader, weights_only
        try:
            yield
        finally:
            if reader is not None:
                reader.close()
            self._epi_reader = None

    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]:
        """Name a file of a rank that saved: scheduler, counters and buffers are the same in all of them."""
        if self._epi_reader is None:
            # DeepSpeed looks for a pattern, and a folder may be called run[lr=1e-5].
            names: list[str] = super()._get_all_ckpt_names(glob.escape(checkpoints_path), glob.escape(tag))
            return names
        rank = dist.get_rank(self.optimizer.dp_process_group) % self._epi_reader.world_size
        return [os.path.join(checkpoints_path, tag, model_states_file(rank))]

    def _load_zero_checkpoint(self, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
        """Load weights and optimizer states. Collective."""
        reader = self._epi_reader
        if reader is None:
            return bool(super()._load_zero_checkpoint(load_dir, tag, load_optimizer_states))

        def load() -> list[str]:
            load_partitions(self.optimizer, reader, weights_only=self._epi_weights_only)
            return load_frozen(self, reader)

        missing = agree(load)
        if missing and dist.get_rank() == 0:
            logger.warning(
                "%s does not hold %d frozen parameters (%s, ...), which keep what the model was made with",
                reader.folder,
                len(missing),
                missing[0],
            )
        return True

    def load_module_state_dict(
        self,
        checkpoint: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Any = None,
        fetch_z3_params: bool = False,
        z3_params_to_fetch: Any = None,
        allowed_missing_keys: Any = None,
    ) -> None:
        """Load buffers; frozen parameters are cut for the ranks that saved them, and are read with the others."""
        if self._epi_reader is not None:
            checkpoint = without_frozen_slices(checkpoint)
        super().load_module_state_dict(
            checkpoint, strict, custom_load_fn, fetch_z3_params, z3_params_to_fetch, allowed_missing_keys
        )


def _is_trainers(folder: Path) -> bool:
    """Whether a trainer wrote a folder: it puts its own state beside the tag."""
    return (folder / "trainer_state.json").exists() or open_checkpoint(folder).manifest is not None
