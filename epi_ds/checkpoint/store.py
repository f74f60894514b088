"""Saving and loading isolation state beside a DeepSpeed checkpoint. Every method is collective."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import epi_ds
from epi_ds.checkpoint.manifest import FOLDER, FileRecord, Manifest, read_manifest, record_of, write_manifest
from epi_ds.checkpoint.shard import FORMAT_VERSION, Shard, shard_name, write_shard
from epi_ds.config import EPIConfig
from epi_ds.isolation.controller import Counters, IsolationController

T = TypeVar("T")

# Settings that say what the saved numbers mean; the others may change between two runs.
_FIXED_SETTINGS = ("policy", "layer", "include", "exclude", "apply", "state", "ema_decay")


def agree(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; where it fails on any, raise the same RuntimeError on all. Collective.

    Without a verdict that all share, the rank with the damaged file raises and the others wait for it in their next
    collective until the process group times out.
    """
    result, problem = None, None
    try:
        result = action()
    except (OSError, RuntimeError, ValueError) as error:
        problem = f"rank {dist.get_rank()}: {error}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = [text for text in problems if text is not None]
    if found:
        raise RuntimeError("\n".join(dict.fromkeys(found)))
    return result  # type: ignore[return-value]


def _digest(config: EPIConfig) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(config.model_dump_json())
    return saved


class FileStateStore:
    """One safetensors shard per rank and a manifest, in the ``epi`` folder of a tag."""

    def save(self, folder: str, controller: IsolationController, *, extra: dict[str, Any]) -> None:
        """Write every rank's shard, then the manifest. See `StateStore.save`."""
        target = Path(folder) / FOLDER
        rank, world_size = controller.exchange.rank, controller.exchange.world_size
        segments = controller.layout.segments
        masks = {segment.name: controller.segment_mask(segment) for segment in segments}
        importance = (
            {segment.name: controller.segment_importance(segment) for segment in segments}
            if controller.measures
            else {}
        )

        def write() -> FileRecord:
            target.mkdir(parents=True, exist_ok=True)
            path = target / shard_name(rank)
            write_shard(path, controller.layout, rank=rank, world_size=world_size, masks=masks, importance=importance)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return record_of(path)

        own = agree(write)
        records: list[FileRecord | None] = [None] * world_size
        dist.all_gather_object(records, own)
        codes = controller.threshold_codes
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
            extra=extra,
            files={shard_name(r): record for r, record in enumerate(records) if record is not None},
        )
        agree(lambda: write_manifest(target, manifest) if dist.get_rank() == 0 else None)

    def verify(self, folder: str, controller: IsolationController) -> bool:
        """Check this rank's shard against the manifest and the layout. See `StateStore.verify`."""
        return agree(lambda: self._verify(Path(folder) / FOLDER, controller))

    def _verify(self, source: Path, controller: IsolationController) -> bool:
        manifest = read_manifest(source)
        if manifest is None:
            return False
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
        expected, found = manifest.files.get(path.name), record_of(path)
        if expected != found:
            raise RuntimeError(
                f"{path} is damaged: the manifest says {expected}, the file is {found}. Load another tag"
            )
        shard = Shard.open(path)
        if shard.segments != controller.layout.segments:
            own, saved = set(controller.layout.segments), set(shard.segments)
            example = next(iter((own - saved) | (saved - own)))
            raise RuntimeError(
                f"{path} has the slices of another model or partitioning; first difference at {example.name}: saved "
                f"{next((s for s in saved if s.name == example.name), None)}, here "
                f"{next((s for s in own if s.name == example.name), None)}"
            )
        return True

    def load(self, folder: str, controller: IsolationController) -> dict[str, Any]:
        """Load this rank's shard. See `StateStore.load`."""
        source = Path(folder) / FOLDER
        manifest = agree(lambda: read_manifest(source))
        if manifest is None:
            raise RuntimeError(f"{source} disappeared while it was being loaded")
        shard = agree(lambda: Shard.open(source / shard_name(controller.exchange.rank)))
        codes = None
        if manifest.threshold_codes is not None:
            codes = torch.tensor([manifest.threshold_codes[name] for name in controller.layout.layer_names])
        controller.restore(
            counters=Counters(**manifest.counters),
            threshold_codes=codes,
            masks={segment.name: mask for segment, mask in shard.masks()},
            importance={segment.name: values for segment, values in shard.importance()},
        )
        return manifest.extra


def load_masks(folder: str, controller: IsolationController) -> None:
    """Put the masks of a saved tag in force, whatever number of ranks saved it. Collective.

    folder  a tag folder, or its ``epi`` folder
    Raises RuntimeError when a covered parameter has no mask there, or one of another shape.
    """
    source = Path(folder)
    if (source / FOLDER).is_dir():
        source = source / FOLDER
    controller.set_masks(agree(lambda: _read_masks(source, controller)))


def _read_masks(source: Path, controller: IsolationController) -> dict[str, Tensor]:
    manifest = read_manifest(source)
    if manifest is None:
        raise RuntimeError(f"mask_from: {source} has no manifest.json; give the folder of a checkpoint tag")
    wanted = controller.layout.by_name
    masks = {name: torch.zeros(segment.real_numel, dtype=torch.bool) for name, segment in wanted.items()}
    missing = set(wanted)
    for name in manifest.files:
        for saved, mask in Shard.open(source / name).masks():
            own = wanted.get(saved.name)
            if own is None:
                continue
            if own.shape != saved.shape:
                raise RuntimeError(f"{source / name}: {saved.name} has shape {saved.shape}, this model has {own.shape}")
            missing.discard(saved.name)
            first = max(own.global_start, saved.global_start)
            last = min(own.global_start + own.real_numel, saved.global_start + saved.real_numel)
            if first < last:
                masks[own.name][first - own.global_start : last - own.global_start] = mask[
                    first - saved.global_start : last - saved.global_start
                ]
    if missing:
        raise RuntimeError(f"mask_from: {source} has no mask of {', '.join(sorted(missing)[:5])}")
    return masks
