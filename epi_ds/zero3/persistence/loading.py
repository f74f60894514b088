"""The engine's loads: of any tag, by any number of ranks.

[Note: loads] What there is to load, and whether it may be read, is decided by `epi_ds.checkpoint` before DeepSpeed
sees a file. A tag of the same layout is then loaded by DeepSpeed; of another one, or of which only the weights are
wanted, its shards are read by parameter (resharding.py). DeepSpeed itself loads no weights at all with
``load_module_only`` under ZeRO-3, and those of ``latest`` instead of the tag's without ``load_optimizer_states``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from epi_ds.checkpoint.catalog import Checkpoint, open_checkpoint
from epi_ds.checkpoint.commit import Run
from epi_ds.checkpoint.deepspeed_files import SavedPartitions
from epi_ds.checkpoint.loading import choose, verify
from epi_ds.checkpoint.manifest import Manifest
from epi_ds.checkpoint.run import check_trusted
from epi_ds.checkpoint.store import check_fits, load_state, newest_in, tag_inside
from epi_ds.checkpoint.verdict import agree, on_first_rank
from epi_ds.choices import MissingState
from epi_ds.errors import CheckpointError, UserError
from epi_ds.zero3.handle import EPI
from epi_ds.zero3.persistence.contents import batch_of, sub_groups_of
from epi_ds.zero3.persistence.cpu_adam import replay_steps
from epi_ds.zero3.persistence.nvme import check_swapped_copies, finish_load
from epi_ds.zero3.persistence.resharding import check_parameters, load_frozen, load_partitions

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
else:
    # A mixin: the class it is mixed over is the engine's own.
    DeepSpeedEngine = object

logger = logging.getLogger(__name__)


class LoadingMixin(DeepSpeedEngine):
    """Loads with the engine's own checkpoints. See [Note: loads]."""

    epi: EPI
    run: Run
    # What `_load_zero_checkpoint` reads instead of DeepSpeed's own way, while a load needs it.
    _reader: SavedPartitions | None = None
    _weights_only = False

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
        weights. NVMe offload refuses it.
        """
        resumes = load_optimizer_states and not load_module_only
        is_swapped = self.zero_nvme_offload_optimizer()
        if is_swapped and not resumes:
            raise RuntimeError(
                "with NVMe offload DeepSpeed loads no weights without optimizer states: it takes those of small "
                "sub-groups from the model as it was made. Load the weights into the model before the engine is made"
            )
        config = self.epi.config
        accepts_plain = not resumes or config.missing_state is MissingState.FRESH
        found = self._choose(Path(load_dir), tag, accepts_plain=accepts_plain)
        if found is None:
            if dist.get_rank() == 0:
                logger.warning("%s holds no checkpoint: nothing is loaded", load_dir)
            return None, None
        folder, manifest = found.path, found.manifest
        if manifest is None and not resumes:
            raise UserError(
                f"{folder} was saved without isolation, and DeepSpeed by itself loads no weights under ZeRO-3 with "
                "load_module_only, and those of `latest` without load_optimizer_states. Load it whole, with "
                "missing_state: fresh, or make a model of it with the zero_to_fp32.py that lies in it"
            )
        run_id, trust = None if manifest is None else manifest.run_id, config.checkpoint.trust
        on_first_rank(lambda: check_trusted(folder, run_id, trust=trust, remedy="set checkpoint.trust: true"))
        arguments = load_module_strict, True, load_lr_scheduler_states, load_module_only, custom_load_fn
        if manifest is None:
            if dist.get_rank() == 0:
                logger.warning("%s has no isolation state; importance starts from zero (missing_state: fresh)", folder)
            return super().load_checkpoint(str(folder.parent), folder.name, *arguments)
        same_layout = self._has_layout_of(manifest)
        if resumes:
            agree(lambda: self._check_resumable(folder, manifest, same_layout))
        if is_swapped:
            check_swapped_copies(self, str(folder))
        reader = None if resumes and same_layout else SavedPartitions(folder, manifest)
        with self._reading(reader, weights_only=not resumes):
            loaded, client_state = super().load_checkpoint(str(folder.parent), folder.name, *arguments)
            if load_module_only:
                # DeepSpeed does not come by `_load_zero_checkpoint` then.
                self.optimizer.checkpoint_event_prologue()
                self._load_zero_checkpoint(str(folder.parent), folder.name)
                self.optimizer.checkpoint_event_epilogue()
        if resumes:
            self._restore_isolation(folder, manifest, same_layout)
        return loaded, client_state

    def _restore_isolation(self, folder: Path, manifest: Manifest, same_layout: bool) -> None:
        """Load what DeepSpeed does not: the isolation state, and what is to go on with it. Collective."""
        if self.zero_nvme_offload_optimizer():
            finish_load(self, str(folder))
        # The counters of before, and what is not yet in them, are replaced together.
        self.optimizer.settle_step_energy()
        load_state(folder, manifest, self.epi.controller, same_layout=same_layout)
        clipping = manifest.isolation.extra["clipping"]
        for average, saved in zip(self.optimizer.isolation.clipping, clipping, strict=True):
            average.restore(saved)
        replay_steps(self.optimizer.optimizer)
        self.run.continues_from(folder, step=self.global_steps)

    def _choose(self, load_dir: Path, tag: str | None, *, accepts_plain: bool) -> Checkpoint | None:
        """Return the verified tag to load; of a trainer's folder the one in it."""
        if self.run.trainer_folder is not None and on_first_rank(lambda: _is_trainers(load_dir)):
            whole = on_first_rank(lambda: open_checkpoint(load_dir))
            if whole.is_plain and accepts_plain:
                inside = on_first_rank(lambda: newest_in(load_dir))
                if inside.is_plain:
                    return inside
            known = whole.problem is None and load_dir == self.run.verified
            problems = [] if known else [whole.problem] if whole.problem is not None else verify(whole)
            if problems:
                raise CheckpointError("; ".join(problems) + ". Resume from another checkpoint")
            return on_first_rank(lambda: tag_inside(whole))
        choice = choose(load_dir, tag, accepts_plain=accepts_plain)
        return None if choice is None else choice.checkpoint

    def _has_layout_of(self, manifest: Manifest) -> bool:
        return manifest.world_size == batch_of(self).world_size and manifest.sub_groups == sub_groups_of(self.optimizer)

    def _check_resumable(self, folder: Path, manifest: Manifest, same_layout: bool) -> None:
        check_fits(
            folder,
            manifest,
            self.epi.controller,
            batch=batch_of(self),
            sub_groups=sub_groups_of(self.optimizer),
            allow_new_batch=self.epi.config.checkpoint.allow_new_batch_size,
        )
        if same_layout:
            return
        before = f"{folder} was saved by {manifest.world_size} ranks with other partitions"
        if self.zero_nvme_offload_optimizer() or manifest.isolation.extra["swapped"]:
            raise UserError(
                f"{before}, and the files of NVMe offload can be read by the ranks that wrote them only; resume with "
                f"{manifest.world_size} ranks and the same sub_group_size"
            )
        if self.optimizer.has_unsaved_moments:
            raise UserError(
                f"{before}, and with partial offload (offload_optimizer.ratio) part of the moments is in no "
                f"checkpoint; resume with {manifest.world_size} ranks, or save with ratio 1.0"
            )

    @contextmanager
    def _reading(self, reader: SavedPartitions | None, *, weights_only: bool) -> Iterator[None]:
        """Within the context, DeepSpeed's load takes weights and states from ``reader``, where there is one."""
        if reader is not None:
            agree(lambda: check_parameters(self.optimizer, reader))
        self._reader, self._weights_only = reader, weights_only
        try:
            yield
        finally:
            if reader is not None:
                reader.close()
            self._reader = None

    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]:
        """Name a file of a rank that saved: scheduler, counters and buffers are the same in all of them."""
        if self._reader is None:
            names: list[str] = super()._get_all_ckpt_names(checkpoints_path, tag)
            return names
        rank = dist.get_rank(self.optimizer.dp_process_group) % self._reader.world_size
        return [os.path.join(checkpoints_path, tag, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")]

    def _load_zero_checkpoint(self, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
        """Load weights and optimizer states. Collective."""
        reader = self._reader
        if reader is None:
            return bool(super()._load_zero_checkpoint(load_dir, tag, load_optimizer_states))

        def load() -> list[str]:
            load_partitions(self.optimizer, reader, weights_only=self._weights_only)
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
        if self._reader is not None:
            checkpoint = {**checkpoint, "frozen_param_fragments": None}
        super().load_module_state_dict(
            checkpoint, strict, custom_load_fn, fetch_z3_params, z3_params_to_fetch, allowed_missing_keys
        )


def _is_trainers(folder: Path) -> bool:
    """Whether a trainer wrote a folder: it puts its own state beside the tag."""
    return (folder / "trainer_state.json").exists() or open_checkpoint(folder).manifest is not None
