"""Saving and loading isolation state beside a DeepSpeed checkpoint. Every method is collective."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import epi_ds
from epi_ds.checkpoint.manifest import (
    FILE,
    FOLDER,
    FileRecord,
    Manifest,
    check_record,
    read_manifest,
    record_of,
    remove_manifest,
    write_manifest,
)
from epi_ds.checkpoint.shard import FORMAT_VERSION, Shard, shard_name, write_shard
from epi_ds.config import EPIConfig
from epi_ds.errors import UserError
from epi_ds.isolation.controller import IsolationController
from epi_ds.isolation.counters import Counters
from epi_ds.kernels import Stored

T = TypeVar("T")

# Settings that say what the saved numbers mean; the others may change between two runs.
_FIXED_SETTINGS = ("policy", "layer", "include", "exclude", "apply", "state", "ema_decay", "memory", "seed")


class _Verdict(NamedTuple):
    """What one rank tells the others about an action."""

    problem: str | None
    users_mistake: bool
    seen: str
    """What every rank must have seen alike."""


def agree(action: Callable[[], T], *, seen: Callable[[T], str] = lambda _: "") -> T:
    """Run ``action`` on every rank; where it fails on any, raise the same error on all. Collective.

    seen  describes what of the result must be the same on every rank

    Raises UserError where every failure is one, else RuntimeError. Without a verdict that all share, the rank with the
    damaged file raises and the others wait for it in their next collective until the process group times out.
    """
    try:
        result = action()
        verdict, cause = _Verdict(None, False, seen(result)), None
    except Exception as error:  # whatever it is, the others must hear of it
        text = (
            str(error) if isinstance(error, (OSError, RuntimeError, UserError)) else f"{type(error).__name__}: {error}"
        )
        verdict, cause = _Verdict(text, isinstance(error, UserError), ""), error
    verdicts: list[_Verdict] = [verdict] * dist.get_world_size()
    dist.all_gather_object(verdicts, verdict)
    failed = {rank: other for rank, other in enumerate(verdicts) if other.problem is not None}
    if failed and all(other.users_mistake for other in failed.values()):
        raise UserError("\n".join(dict.fromkeys(str(other.problem) for other in failed.values()))) from cause
    if failed:
        raise RuntimeError("\n".join(f"rank {rank}: {other.problem}" for rank, other in failed.items())) from cause
    if len({other.seen for other in verdicts}) > 1:
        lines = (f"rank {rank}: {other.seen}" for rank, other in enumerate(verdicts))
        raise RuntimeError(
            "the ranks do not see the same checkpoint; put it where every node reads the same files\n"
            + "\n".join(lines)
        )
    return result


def _digest(config: EPIConfig) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(config.model_dump_json())
    return saved


def _describe(source: Path, manifest: Manifest | None) -> str:
    """Say which manifest this is, in one line."""
    if manifest is None:
        return f"{source} has no {FILE}"
    return f"{source / FILE} of content {hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:16]}"


class _State(NamedTuple):
    """One rank's saved state, as read."""

    manifest: Manifest
    masks: dict[str, Tensor]
    states: dict[str, dict[str, Stored]]
    first_mask: list[Tensor]


class FileStateStore:
    """One safetensors shard per rank and a manifest, in the ``epi`` folder of a tag."""

    def discard(self, folder: str) -> None:
        """Remove the manifest. See `StateStore.discard`."""
        agree(lambda: remove_manifest(Path(folder) / FOLDER) if dist.get_rank() == 0 else None)

    def save(self, folder: str, controller: IsolationController, *, extra: dict[str, Any]) -> None:
        """Write every rank's shard, then the manifest. See `StateStore.save`."""
        target = Path(folder) / FOLDER
        rank, world_size = controller.exchange.rank, controller.exchange.world_size

        def write() -> FileRecord:
            target.mkdir(parents=True, exist_ok=True)
            path = target / shard_name(rank)
            write_shard(
                path,
                controller.layout,
                rank=rank,
                world_size=world_size,
                mask_of=controller.masks.segment,
                states={name: state.stored for name, state in controller.states.items()},
                first_mask=controller.refresher.first_mask.sample,
            )
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return record_of(path)

        own = agree(write)
        records: list[FileRecord | None] = [None] * world_size
        dist.all_gather_object(records, own)
        codes, rows = controller.refresher.threshold_codes, controller.refresher.selector.last_row_codes
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            versions={
                "epi_ds": epi_ds.__version__,
                "deepspeed": deepspeed.__version__,
                "torch": torch.__version__,
            },
            world_size=world_size,
            counters=controller.counters.to_dict(),
            config=_digest(controller.config),
            threshold_codes=(
                None if codes is None else dict(zip(controller.layout.layer_names, codes.tolist(), strict=True))
            ),
            last_row_codes=None if rows is None else rows.tolist(),
            extra=extra,
            files={shard_name(r): record for r, record in enumerate(records) if record is not None},
        )
        agree(lambda: write_manifest(target, manifest) if dist.get_rank() == 0 else None)

    def verify(self, folder: str, controller: IsolationController) -> bool:
        """Check this rank's shard against the manifest and the layout. See `StateStore.verify`."""
        source = Path(folder) / FOLDER
        manifest = agree(lambda: self._verify(source, controller), seen=lambda found: _describe(source, found))
        return manifest is not None

    def _verify(self, source: Path, controller: IsolationController) -> Manifest | None:
        manifest = read_manifest(source)
        if manifest is None:
            return None
        rank, world_size = controller.exchange.rank, controller.exchange.world_size
        if manifest.world_size != world_size:
            raise RuntimeError(
                f"{source} was saved by {manifest.world_size} ranks and is being loaded by {world_size}; start "
                f"{manifest.world_size} ranks"
            )
        current = _digest(controller.config)
        changed = [
            f"{name} was {manifest.config.get(name)!r}, is {current[name]!r}"
            for name in _FIXED_SETTINGS
            if manifest.config.get(name) != current[name]
        ]
        if changed:
            raise RuntimeError(
                f"{source} belongs to other settings: {'; '.join(changed)}. Restore them, or begin a new run from the "
                "weights (load_module_only)"
            )
        path = source / shard_name(rank)
        check_record(path, manifest)
        shard = Shard.open(path)
        if shard.segments != controller.layout.segments:
            own, saved = set(controller.layout.segments), set(shard.segments)
            example = next(iter((own - saved) | (saved - own)))
            raise RuntimeError(
                f"{path} has the slices of another model or partitioning; first difference at {example.name}: saved "
                f"{next((s for s in saved if s.name == example.name), None)}, here "
                f"{next((s for s in own if s.name == example.name), None)}"
            )
        return manifest

    def load(self, folder: str, controller: IsolationController) -> dict[str, Any]:
        """Load this rank's shard. See `StateStore.load`."""
        source = Path(folder) / FOLDER
        state = agree(
            lambda: self._read(source, controller.exchange.rank), seen=lambda read: _describe(source, read.manifest)
        )
        codes = None
        if state.manifest.threshold_codes is not None:
            codes = torch.tensor([state.manifest.threshold_codes[name] for name in controller.layout.layer_names])
        rows = state.manifest.last_row_codes
        controller.restore(
            counters=Counters.from_dict(state.manifest.counters),
            threshold_codes=codes,
            masks=state.masks,
            states=state.states,
            first_mask=state.first_mask,
            last_row_codes=None if rows is None else torch.tensor(rows),
        )
        return state.manifest.extra

    def _read(self, source: Path, rank: int) -> _State:
        manifest = read_manifest(source)
        if manifest is None:
            raise RuntimeError(f"{source} disappeared while it was being loaded")
        shard = Shard.open(source / shard_name(rank))
        return _State(
            manifest,
            {segment.name: mask for segment, mask in shard.masks()},
            {name: shard.stored(name) for name in shard.states},
            shard.first_mask(),
        )


def load_masks(folder: str, controller: IsolationController) -> None:
    """Put the masks of a saved tag in force, whatever number of ranks saved it. Collective.

    folder  a tag folder, or its ``epi`` folder
    Raises UserError when a covered parameter has no mask there or one of another shape, or when nothing is isolated.
    """
    source = Path(folder)
    if (source / FOLDER).is_dir():
        source = source / FOLDER
    controller.refresher.load(agree(lambda: _read_masks(source, controller)))


def _read_masks(source: Path, controller: IsolationController) -> dict[str, Tensor]:
    manifest = read_manifest(source)
    if manifest is None:
        raise UserError(f"mask_from: {source} has no {FILE}; give the folder of a checkpoint tag")
    wanted = controller.layout.by_name
    masks = {name: torch.zeros(segment.real_numel, dtype=torch.bool) for name, segment in wanted.items()}
    missing, isolated = set(wanted), 0
    for name in manifest.files:
        check_record(source / name, manifest)
        for saved, mask in Shard.open(source / name).masks():
            own = wanted.get(saved.name)
            if own is None:
                continue
            if own.shape != saved.shape:
                raise UserError(
                    f"mask_from: {source / name}: {saved.name} has shape {saved.shape}, this model has {own.shape}; "
                    "give a checkpoint of this model"
                )
            missing.discard(saved.name)
            isolated += int(mask.sum())
            first = max(own.global_start, saved.global_start)
            last = min(own.global_start + own.real_numel, saved.global_start + saved.real_numel)
            if first < last:
                masks[own.name][first - own.global_start : last - own.global_start] = mask[
                    first - saved.global_start : last - saved.global_start
                ]
    if missing:
        raise UserError(
            f"mask_from: {source} has no mask of {', '.join(sorted(missing)[:5])}; exclude what was not covered there"
        )
    if not isolated:
        raise UserError(
            f"mask_from: the mask in {source} isolates nothing: it was saved before a mask was selected (after "
            f"{manifest.counters['applied_steps']} steps, {manifest.counters['refreshes']} refreshes); give a later tag"
        )
    return masks
