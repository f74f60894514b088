"""What another release wrote: a key it lacks means its default, and one that this release does not know is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epi_ds.checkpoint.durable import write_json
from epi_ds.checkpoint.manifest import PATH, Manifest, read_manifest, sealed
from epi_ds.checkpoint.run import FILE, read_run
from epi_ds.checkpoint.shard import Shard, shard_name
from epi_ds.checkpoint.tensor_file import write_tensor_file
from epi_ds.errors import CheckpointError
from epi_ds.isolation.counters import Counters

SAVED = Path(__file__).parents[1] / "compatibility" / "v0_1_0" / "engine" / "checkpoints"
CONTENT: dict[str, Any] = json.loads((SAVED / "global_step7" / PATH).read_text())

# Without one of these nobody could say what the checkpoint is of: no default would be true of it.
REQUIRED = {
    # Whose pickles they are, and what is vouched for.
    "run_id",
    "kind",
    "files",
    "format_version",
    # Where it continues, with which rows, and in which precision it is exported.
    "step",
    "batch",
    "batch.micro_batch",
    "batch.accumulation",
    "batch.world_size",
    "model_dtype",
    # What lies where in the flat partitions.
    "sub_groups",
    # What was isolated, by which settings; within the two dicts every key has a default.
    "isolation",
    "isolation.config",
    "isolation.counters",
    "isolation.states",
}
OPTIONAL = {
    "incarnation": 0,
    "saved_at": "",
    "versions": {},
    "isolation.threshold_codes": None,
    "isolation.last_row_codes": None,
    "isolation.extra": {"clipping": [], "swapped": {}, "anchor": None},
    "isolation.extra.clipping": [],
    "isolation.extra.swapped": {},
    "isolation.extra.anchor": None,
    **{f"isolation.counters.{name}": value for name, value in Counters().to_dict().items()},
}
# Its default is true of importance that nothing was observed of, and this one was.
WEIGHT = "isolation.counters.importance_weight"
del OPTIONAL[WEIGHT]


def keys_of(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key that has a meaning of its own: not names of parameters, layers, files, libraries or settings."""
    for name, value in content.items():
        yield f"{prefix}{name}"
        if name in ("batch", "isolation", "extra", "counters"):
            yield from keys_of(value, f"{prefix}{name}.")


KEYS = [key for key in keys_of(CONTENT) if key != "digest"]


def value_at(content: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def written(folder: Path, *, without: str | None = None, also: str | None = None) -> Path:
    """A folder with the saved manifest, without a key or with one more, whole as far as its digest goes."""
    content = {name: value for name, value in copy.deepcopy(CONTENT).items() if name != "digest"}
    if without is not None:
        parent, _, name = without.rpartition(".")
        del (value_at(content, parent) if parent else content)[name]
    if also is not None:
        parent, _, name = also.rpartition(".")
        (value_at(content, parent) if parent else content)[name] = 1
    (folder / PATH).parent.mkdir(parents=True)
    write_json(folder / PATH, sealed(content))
    return folder


def read(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def test_every_key_is_either_required_or_has_a_default() -> None:
    assert set(KEYS) == REQUIRED | OPTIONAL.keys() | {WEIGHT}


def test_the_weight_of_observed_importance_has_no_default(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"isolation\.counters: importance_weight is missing or 0"):
        read(written(tmp_path / "a", without=WEIGHT))


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_a_key_that_a_manifest_lacks_means_its_default(tmp_path: Path, key: str) -> None:
    manifest = read(written(tmp_path / "a", without=key))
    assert manifest.step == 7
    if key.startswith("isolation.counters."):
        name = key.rpartition(".")[2]
        counters = manifest.counters.to_dict()
        assert counters == {**CONTENT["isolation"]["counters"], name: OPTIONAL[key]}
    else:
        assert value_at(manifest.model_dump(mode="json"), key) == OPTIONAL[key]


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_a_key_without_a_default_is_missed_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        read(written(tmp_path / "a", without=key))
    # Which format it is decides who reads it, before any other key is looked at.
    assert ("format version None" if key == "format_version" else f"{key}: Field required") in str(refused.value)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("novel", "novel"),
        ("batch.novel", "batch.novel"),
        ("isolation.novel", "isolation.novel"),
        ("isolation.extra.novel", "isolation.extra.novel"),
        ("isolation.counters.novel", "isolation.counters"),
    ],
)
def test_what_a_newer_release_wrote_is_said_to_be_that(tmp_path: Path, key: str, named: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"newer release of epi_ds \(0\.1\.0\): this one does not know {named}\."
    ):
        read(written(tmp_path / "a", also=key))


def test_the_record_of_a_run_too(tmp_path: Path) -> None:
    content = json.loads((SAVED / FILE).read_text())
    for name, default in (("incarnation", 0), ("host", "an unknown host"), ("pid", 0), ("since", "an unknown time")):
        write_json(tmp_path / FILE, {key: value for key, value in content.items() if key != name})
        record = read_run(tmp_path)
        assert record is not None
        assert (getattr(record, name), record.run_id) == (default, content["run_id"])
    for name in ("run_id", "holder"):
        write_json(tmp_path / FILE, {key: value for key, value in content.items() if key != name})
        with pytest.raises(CheckpointError, match="is damaged"):
            read_run(tmp_path)
    write_json(tmp_path / FILE, {**content, "novel": 1})
    with pytest.raises(CheckpointError, match=r"newer release of epi_ds .*: this one does not know novel"):
        read_run(tmp_path)


def test_the_header_of_a_shard_too(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    shutil.copyfile(SAVED / "global_step7" / "epi" / shard_name(0), path)
    header = json.loads(Shard(path).header.model_dump_json())

    def rewrite(content: dict[str, Any]) -> Path:
        write_tensor_file(path, {}, {"epi_ds": json.dumps(content)})
        return path

    without = {name: value for name, value in header.items() if name != "random_states"}
    assert Shard(rewrite(without)).header.random_states == {}
    for name in ("rank", "world_size", "segments"):
        with pytest.raises(CheckpointError, match="is not a readable isolation shard"):
            Shard(rewrite({key: value for key, value in header.items() if key != name}))
    with pytest.raises(CheckpointError, match=r"newer release of epi_ds .*: this one does not know novel"):
        Shard(rewrite({**header, "novel": 1}))
