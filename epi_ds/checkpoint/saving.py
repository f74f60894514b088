"""Saving a tag: every rank writes its files, and one rename makes them a checkpoint.

[Note: commit] All files are written under ``TAG.incomplete``. Each is checksummed and synced by the rank that wrote
it, in threads of their own while the next one is being written. When every rank has said that its files are whole,
rank 0 writes the manifest, and gives the folder its name. A process that is killed before leaves a folder that nobody
takes for a checkpoint; one that fails fails on all ranks alike, and what was there before is as it was.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from epi_ds.checkpoint.catalog import INCOMPLETE, put_in_place, remove
from epi_ds.checkpoint.deepspeed_files import LATEST
from epi_ds.checkpoint.digest import FileRecord, record_of
from epi_ds.checkpoint.durable import sync_file, sync_folder, write_text
from epi_ds.checkpoint.manifest import FOLDER, PATH, Manifest, write_manifest
from epi_ds.checkpoint.verdict import agree, describe, on_first_rank
from epi_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

# A checksum and a sync at once: the one takes a processor, the other the disk.
_THREADS = 2
# Room for what is not counted: a trainer's own files, and the file system's.
_SPARE_BYTES = 64 << 20


class SaveTimes(NamedTuple):
    """Seconds of one rank's save. The work in threads overlaps with everything else."""

    total: float
    digest: float
    """Seconds of checksums, added up over the threads."""
    sync: float
    """Seconds until files were on the disk, added up over the threads."""
    wait: float
    """Seconds that were waited for those threads after the last file was written."""
    manifest: float
    """Seconds of listing files, writing the manifest and renaming."""
    num_bytes: int
    """The bytes of all ranks' files."""


class _Done(NamedTuple):
    record: FileRecord
    digest_seconds: float
    sync_seconds: float


def now() -> str:
    """Return the time of day as manifests have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError unless the file system has room for so many bytes, on rank 0. Collective."""

    def check() -> None:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free < num_bytes + _SPARE_BYTES:
            raise CheckpointError(
                f"{folder}: a checkpoint takes {num_bytes / 1e9:.2f} GB, and the file system has {free / 1e9:.2f} GB "
                "free; make room, or keep fewer checkpoints (checkpoint.keep_last)"
            )

    on_first_rank(check)


class TagWriter:
    """One rank's part of a tag that is being saved. See [Note: commit]."""

    def __init__(self, save_dir: Path, tag: str) -> None:
        """Make the folder to write to. Collective; raises on all ranks alike."""
        self._started = time.perf_counter()
        self._save_dir, self._tag = save_dir, tag
        self._errors: list[str] = []
        self._pool = ThreadPoolExecutor(max_workers=_THREADS)
        self._done: dict[str, Future[_Done]] = {}
        on_first_rank(self._make_folder)

    @property
    def temporary_tag(self) -> str:
        """Name under which files are written."""
        return self._tag + INCOMPLETE

    @property
    def folder(self) -> Path:
        """Where files are written."""
        return self._save_dir / self.temporary_tag

    def _make_folder(self) -> None:
        if self.folder.exists():
            # Of a save that failed in this process; those of others were put right when the folder was taken over.
            shutil.rmtree(self.folder)
        (self.folder / FOLDER).mkdir(parents=True)

    def wrote(self, path: Path) -> None:
        """Note that this rank has written a file to its end: it is checksummed and synced meanwhile."""
        self._done[str(path.relative_to(self.folder))] = self._pool.submit(_secure, path)

    def failed(self, path: Path, error: BaseException) -> None:
        """Note that this rank could not write a file. The others hear of it in `commit`."""
        self._errors.append(f"{path}: {describe(error)}")

    def run(self, path: Path, write: Callable[[], object]) -> None:
        """Write a file, and note how that went."""
        try:
            write()
        except Exception as error:
            self.failed(path, error)
        else:
            self.wrote(path)

    def commit(self, manifest_of: Callable[[Mapping[str, FileRecord]], Manifest], *, save_latest: bool) -> SaveTimes:
        """Make the tag a checkpoint, once every rank has written its files. Collective.

        manifest_of  is asked on rank 0, with the records of all files

        Raises CheckpointError on all ranks where one of them failed; the folder is then removed.
        """
        waited = time.perf_counter()
        try:
            own = agree(self._results)
            records = _of_all_ranks({name: done.record for name, done in own.items()})
            committing = time.perf_counter()
            num_bytes = on_first_rank(lambda: self._commit(records, manifest_of, save_latest=save_latest))
        except Exception:
            self.discard()
            raise
        ended = time.perf_counter()
        return SaveTimes(
            total=ended - self._started,
            digest=sum(done.digest_seconds for done in own.values()),
            sync=sum(done.sync_seconds for done in own.values()),
            wait=committing - waited,
            manifest=ended - committing,
            num_bytes=num_bytes,
        )

    def discard(self) -> None:
        """Give the save up: remove what was written. Best effort, on rank 0."""
        self._pool.shutdown()
        if dist.get_rank() == 0 and self.folder.exists():
            remove(self.folder)

    def _results(self) -> dict[str, _Done]:
        if self._errors:
            raise CheckpointError("; ".join(self._errors))
        return {name: future.result() for name, future in self._done.items()}

    def _commit(
        self,
        records: Mapping[str, FileRecord],
        manifest_of: Callable[[Mapping[str, FileRecord]], Manifest],
        *,
        save_latest: bool,
    ) -> int:
        self._pool.shutdown()
        folders = {self.folder}
        found = dict(records)
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_dir():
                folders.add(path)
            elif name not in found and name != PATH:
                # What DeepSpeed wrote without asking the checkpoint engine.
                found[name] = _secure(path).record
        for folder in folders:
            sync_folder(folder)
        manifest = manifest_of(found)
        write_manifest(self.folder, manifest)
        put_in_place(self.folder)
        if save_latest:
            try:
                # For tools that read it; a resume looks at the checkpoints themselves.
                write_text(self._save_dir / LATEST, self._tag)
            except OSError as error:
                logger.warning("%s is complete, but `latest` could not be written: %s", self._tag, error)
        return manifest.num_bytes


def _secure(path: Path) -> _Done:
    started = time.perf_counter()
    record = record_of(path)
    hashed = time.perf_counter()
    sync_file(path)
    return _Done(record, hashed - started, time.perf_counter() - hashed)


def _of_all_ranks(own: dict[str, FileRecord]) -> dict[str, FileRecord]:
    gathered: list[dict[str, FileRecord]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {name: record for records in gathered for name, record in records.items()}
