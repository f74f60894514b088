"""Starting ranks: whose devices, what is said of lost ones, and locks that builds leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import epi_ds
from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.launch.local import device_ids
from epi_ds.launch.lost_ranks import lost_rank, signal_of
from epi_ds.launch.operators import nvme_builders, stale_locks


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What torch says on a machine with four GPUs, which this one need not be."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    return monkeypatch


@pytest.mark.parametrize(
    ("visible", "expected"), [("", [0, 1]), ("4,5,6,7", [4, 5]), ("GPU-8a, GPU-9b,7,6", ["GPU-8a", "GPU-9b"])]
)
def test_ranks_use_the_devices_that_the_user_left_visible(
    four_gpus: pytest.MonkeyPatch, visible: str, expected: list[int | str]
) -> None:
    four_gpus.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_ids(2) == expected


def test_more_ranks_than_devices_are_refused(four_gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ranks: 5, but this machine shows 4 devices.*set ranks=4"):
        device_ids(5)
    four_gpus.setenv("DS_ACCELERATOR", "cpu")
    assert device_ids(5) == [0, 1, 2, 3, 4]


def test_a_lock_is_stale_when_no_process_keeps_it_open(tmp_path: Path) -> None:
    killed, building = tmp_path / "fused_adam" / "lock", tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    for lock in (killed, building):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with building.open():
        assert stale_locks(tmp_path) == [killed]
    assert stale_locks(tmp_path) == [killed, building]


@pytest.mark.parametrize("installed", [True, False])
def test_the_operator_of_nvme_is_built_where_its_library_is(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    from deepspeed.accelerator import get_accelerator

    builder = type(get_accelerator().create_op_builder("AsyncIOBuilder"))
    monkeypatch.setattr(builder, "has_function", lambda self, function, libraries: installed)
    lines: list[str] = []
    assert nvme_builders(lines.append) == (("AsyncIOBuilder",) if installed else ())
    assert any("apt-get install libaio-dev" in line for line in lines) == (not installed)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40094. This is typically caused",
            "another rank has ended (Connection closed by peer [127.0.0.1]:40094). Its own message says ",
        ),
        (
            "[/gloo/unbound_buffer.cc:129] Timed out waiting 15000ms for send operation to complete",
            "another rank was stopped or hangs (Timed out waiting 15000ms for send operation to complete). train.ddp_",
        ),
        (
            "NCCL error\nncclRemoteError: remote process exited or there was a network error",
            "another rank has ended (",
        ),
        ("CUDA out of memory", None),
    ],
)
def test_errors_of_collectives_tell_of_lost_ranks(said: str, expected: str | None) -> None:
    found = lost_rank(RuntimeError(said))
    assert found is None if expected is None else (found or "").startswith(expected)


def test_signals_are_read_off_exit_codes() -> None:
    # As DeepSpeed's launcher passes on a rank's -9, and as Popen says that the launcher itself was killed.
    assert [signal_of(code) for code in (247, -9, 241, 0, 1, 2)] == [9, 9, 15, None, None, None]


def test_a_run_is_not_thrown_away_and_continued() -> None:
    """Where both are asked for, nothing has been removed when it is refused."""
    found = CliRunner().invoke(app, ["train", "no_such_recipe.yaml", "--restart", "--resume", "step:3"])
    assert isinstance(found.exception, UserError)
    assert "--restart throws away what --resume step:3 would continue from" in str(found.exception)


def test_the_command_says_its_version_and_what_a_misspelt_verb_might_be() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"epi-ds {epi_ds.__version__}\n"
    for words, meant in ((["trian", "demo"], "train"), (["launch", "slrum", "demo"], "slurm")):
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 2
        assert f"Did you mean '{meant}'?" in found.output


def test_every_public_name_is_seen_by_who_looks() -> None:
    assert set(epi_ds.__all__) <= set(dir(epi_ds))
    assert all(getattr(epi_ds, name) is not None for name in epi_ds.__all__)
