"""A run that goes on is the same run for its tracker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from epi_ds import trackers
from epi_ds.checkpoint.run import read_run, run_id_of, take_over
from epi_ds.errors import UserError

# Of the functions of transformers that ask for them.
NAMES_THERE = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
# Only asked by a job of its own.
WITHOUT_MODULE = ("kubeflow",)
NAMES = ("WANDB_RUN_ID", "WANDB_RESUME", "SWANLAB_RUN_ID", "SWANLAB_RESUME", "TENSORBOARD_LOGGING_DIR")


def start(report_to: object) -> None:
    """What a command does before it starts ranks."""
    trackers.check_installed(trackers.trackers_in(report_to))


def test_what_is_not_installed_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tensorboardX"}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name if name in there else None)
    for report_to in (None, "none", "all", "tensorboard", ["none"], ["kubeflow"]):
        start(report_to)
    with pytest.raises(UserError) as raised:
        start(["wandb", "tensorboard", "comet_ml"])
    assert str(raised.value) == (
        "train.report_to: wandb, comet_ml are not installed here: pip install wandb comet-ml, or remove it"
    )
    with pytest.raises(UserError, match=r"azure_ml is not installed here: pip install azureml-core, or remove it"):
        start("azure_ml")


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
def test_it_is_installed_where_transformers_says_so(name: str) -> None:
    check = getattr(integration_utils, f"is_{NAMES_THERE.get(name, name)}_available")
    if name in WITHOUT_MODULE or check():
        start(name)
    else:
        with pytest.raises(UserError, match=f"{name} is not installed here: pip install"):
            start(name)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        # So that what is set is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(trackers, "_set", {})


def found() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_trackers_find_the_run_of_the_folder(tmp_path: Path) -> None:
    trackers.continue_runs(["wandb", "tensorboard", "comet_ml"], tmp_path, run_id="abc")
    expected = {"WANDB_RUN_ID": "abc", "WANDB_RESUME": "allow", "TENSORBOARD_LOGGING_DIR": f"{tmp_path}/tensorboard"}
    assert found() == expected
    # Another trainer of this process is another run.
    trackers.continue_runs(["wandb"], tmp_path, run_id="def")
    assert found() == {**expected, "WANDB_RUN_ID": "def"}


def test_what_the_user_has_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_RUN_ID", "mine")
    trackers.continue_runs(["swanlab"], tmp_path, run_id="abc")
    assert found() == {"SWANLAB_RUN_ID": "mine", "SWANLAB_RESUME": "allow"}


def test_the_id_is_there_before_anything_is_saved_and_stays(tmp_path: Path) -> None:
    drawn = run_id_of(tmp_path)
    assert run_id_of(tmp_path) == drawn
    # Asking takes the folder from nobody.
    record = take_over(tmp_path)
    assert (record.run_id, record.incarnation) == (drawn, 1)
    assert run_id_of(tmp_path) == drawn
    assert read_run(tmp_path) == record
