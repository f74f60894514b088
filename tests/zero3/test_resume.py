"""Save and load: a resumed run continues bit for bit, and what does not fit is refused by every rank alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from epi_ds.checkpoint.audit import audit
from epi_ds.cli.main import app
from tests.support.engines import (
    assert_same,
    ds_config,
    engine_of,
    full_importance,
    full_masks,
    full_moments,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, TwoHeads, odd_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.zero3

SECTION = {"ratio": 0.2, "refresh_interval": 4, "ema_decay": 0.9}


def _final(engine: Any) -> dict[str, Any]:
    return {
        "state": full_weights(engine) | full_moments(engine),
        "importance": full_importance(engine),
        "masks": full_masks(engine),
        "numbers": (
            engine.epi.stats().counters,
            engine.epi.thresholds(),
            [average.to_dict() for average in engine.optimizer.isolation.clipping],
        ),
    }


def check_resume(folder: str, apply: str, offload: bool, stop: int) -> None:
    config = ds_config(epi=SECTION | {"apply": apply}, offload=offload, accumulation=2)
    with engine_of(OddNet, config) as engine:
        losses = [train_step(engine, step, odd_batch) for step in range(10)]
        expected = _final(engine)
    with engine_of(OddNet, config) as engine:
        for step in range(stop):
            train_step(engine, step, odd_batch)
        engine.save_checkpoint(folder)
    with engine_of(OddNet, config) as engine:
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        resumed = [train_step(engine, step, odd_batch) for step in range(stop, 10)]
        final = _final(engine)
    assert torch.equal(torch.tensor(resumed), torch.tensor(losses[stop:]))
    for key in ("state", "importance", "masks"):
        assert_same(expected[key], final[key])
    assert expected["numbers"] == final["numbers"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("apply", ["reduction", "update"])
def test_resume_is_bit_exact(tmp_path: Path, world_size: int, apply: str) -> None:
    run_ranks(check_resume, world_size, str(tmp_path / "a"), apply, False, 6)


@pytest.mark.parametrize("stop", [4, 8], ids=["right-after-first-refresh", "right-after-second-refresh"])
def test_resume_right_after_a_refresh(tmp_path: Path, stop: int) -> None:
    # Entries were released and isolated at that step: their moments must have been set before the save.
    run_ranks(check_resume, 2, str(tmp_path), "reduction", True, stop)


def save_run(folder: str, section: dict[str, Any], steps: int) -> None:
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(steps):
            train_step(engine, step, odd_batch)
            engine.save_checkpoint(folder)


def load_error(folder: str, section: dict[str, Any], tag: str | None = None) -> str:
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        before = full_weights(engine)
        try:
            engine.load_checkpoint(folder, tag=tag)
        except RuntimeError as error:
            assert_same(before, full_weights(engine))
            return str(error)
        return ""


def save_plain(folder: str) -> None:
    with engine_of(OddNet, ds_config()) as engine:
        train_step(engine, 0, odd_batch)
        engine.save_checkpoint(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks after each of 6 steps; the mask of step 4 is in force in the last three."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_run, 2, str(folder), SECTION, 6)
    return folder


def test_damage_is_refused_on_every_rank(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    shard = folder / "global_step6" / "epi" / "rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    errors = run_ranks(load_error, 2, str(folder), SECTION)
    assert errors[0] == errors[1]
    assert "rank_00001.safetensors is damaged" in errors[0]
    assert run_ranks(load_error, 2, str(folder), SECTION, "global_step5") == ["", ""]


def test_a_torn_manifest_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(saved, folder)
    manifest = folder / "global_step6" / "epi" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    errors = run_ranks(load_error, 2, str(folder), SECTION)
    assert errors[0] == errors[1]
    assert str(manifest) in errors[0]


def test_other_settings_and_world_sizes_are_refused_by_name(saved: Path) -> None:
    (error, _) = run_ranks(load_error, 2, str(saved), SECTION | {"layer": "tensor", "ema_decay": 0.5})
    assert "layer was 'block', is 'tensor'" in error
    assert "ema_decay was 0.9, is 0.5" in error
    (error,) = run_ranks(load_error, 1, str(saved), SECTION)
    assert "saved by 2 ranks" in error
    # The schedule and the ratio may change between two runs.
    assert run_ranks(load_error, 2, str(saved), SECTION | {"ratio": 0.1, "refresh_interval": 9}) == ["", ""]


def test_a_checkpoint_without_isolation_state_needs_consent(tmp_path: Path) -> None:
    run_ranks(save_plain, 2, str(tmp_path))
    (error, _) = run_ranks(load_error, 2, str(tmp_path), SECTION)
    assert "has no isolation state" in error
    assert "missing_state: fresh" in error
    assert run_ranks(load_error, 2, str(tmp_path), SECTION | {"missing_state": "fresh"}) == ["", ""]


def test_audit_finds_held_weights_and_a_moved_one(saved: Path, tmp_path: Path) -> None:
    report = audit([saved])
    assert [(a.name, b.name) for a, b in report.pairs] == [
        ("global_step4", "global_step5"),
        ("global_step5", "global_step6"),
    ]
    assert report.isolated > 0
    assert report.isolated_moved == 0
    assert report.plastic_moved > 0.8 * report.plastic

    folder = tmp_path / "moved"
    shutil.copytree(saved, folder)
    _flip_one_isolated_weight(folder / "global_step5")
    report = audit([folder])
    # The flipped weight differs from the checkpoint before it and from the one after it.
    assert [item.num_entries for item in report.moved] == [1, 1]

    command = CliRunner()
    sound, damaged = command.invoke(app, ["audit", str(saved)]), command.invoke(app, ["audit", str(folder)])
    assert (sound.exit_code, damaged.exit_code) == (0, 1)
    assert "moved 0;" in sound.output
    assert "MOVED 1 entries of" in damaged.output


def _flip_one_isolated_weight(tag: Path) -> None:
    from epi_ds.checkpoint.shard import Shard

    for rank in range(2):
        file = tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = torch.load(file, weights_only=False)
        for segment, mask in Shard.open(tag / "epi" / f"rank_{rank:05d}.safetensors").masks():
            if mask.any():
                flat = state["optimizer_state_dict"]["fp32_flat_groups"][segment.sub_group].detach()
                index = segment.start + int(torch.nonzero(mask)[0])
                flat.view(torch.int32)[index] ^= 1
                torch.save(state, file)
                return
    raise AssertionError("no isolated weight to flip")


def test_audit_needs_two_checkpoints_of_one_window(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no two checkpoints were saved within one refresh window"):
        audit([saved / "global_step5"])
    with pytest.raises(ValueError, match="holds no checkpoint with isolation state"):
        audit([tmp_path])


def check_stale_warning(folder: str) -> list[str]:
    import logging

    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect()
    logging.getLogger("epi_ds").addHandler(handler)
    try:
        with engine_of(TwoHeads, ds_config(epi=SECTION)) as engine:
            for step in range(2):
                train_step(engine, step, lambda *_: (torch.ones(4, 7), 0))
            engine.save_checkpoint(folder)
    finally:
        logging.getLogger("epi_ds").removeHandler(handler)
    return messages if dist.get_rank() == 0 else []


def test_a_save_after_an_unused_parameter_warns_by_name(tmp_path: Path) -> None:
    messages = run_ranks(check_stale_warning, 2, str(tmp_path))[0]
    assert any("heads.1.weight, heads.1.bias" in message for message in messages)


def test_the_manifest_is_readable_by_people(saved: Path) -> None:
    manifest = json.loads((saved / "global_step6" / "epi" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert manifest["counters"] == {
        "applied_steps": 6,
        "observed_steps": 6,
        "active_steps": 2,
        "refreshes": 1,
    }
    assert manifest["config"]["ratio"] == 0.2
    assert set(manifest["files"]) == {"rank_00000.safetensors", "rank_00001.safetensors"}
