"""What the command says of an error, and the exit code it ends with."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from epi_ds.checkpoint.verdict import AgreedError
from epi_ds.cli import main as command
from epi_ds.errors import CheckpointError, LostRankError, RemedyError, UserError


@pytest.mark.parametrize(
    ("error", "code", "rank", "is_said"),
    [
        (UserError, 2, None, True),
        (UserError, 2, "0", True),
        (UserError, 2, "1", False),
        (CheckpointError, 1, None, True),
        (AgreedError, 1, "0", True),
        (CheckpointError, 1, "1", False),
        (RemedyError, 1, None, True),
        (RemedyError, 1, "0", True),
        (RemedyError, 1, "1", False),
        (LostRankError, 1, "1", True),
        (IsADirectoryError, 1, None, True),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    error: type[Exception],
    code: int,
    rank: str | None,
    is_said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes_of_ranks = run_raising(error, rank, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == code
    # Threads of gloo would abort a rank that is torn down, and its exit code would be another one.
    assert codes_of_ranks == ([] if rank is None else [code])
    assert capsys.readouterr().err == ("error: what, and the remedy\n" if is_said else "")


@pytest.mark.parametrize(("error", "rank"), [(RuntimeError, None), (KeyError, "0"), (OSError, "0"), (OSError, "1")])
def test_what_may_be_a_bug_keeps_its_traceback(
    error: type[Exception], rank: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes_of_ranks = run_raising(error, rank, monkeypatch)
    with pytest.raises(error):
        command.main()
    assert codes_of_ranks == ([] if rank is None else [1])


def run_raising(error: type[Exception], rank: str | None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prepare a command that fails, in a rank or outside; return where the codes will be that a rank ends with."""

    def fail(**_: object) -> None:
        raise error("what, and the remedy")

    monkeypatch.setattr(command, "app", fail)
    # What it does to the process's logging is not for other tests.
    monkeypatch.setattr(command, "_quieten", lambda: None)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    codes_of_ranks: list[int] = []
    monkeypatch.setattr(command, "skip_teardown", codes_of_ranks.append)
    return codes_of_ranks


@pytest.fixture
def own_level() -> Iterator[None]:
    """What --debug does to the process's logging is not for other tests."""
    package = logging.getLogger("epi_ds")
    before = package.level
    yield
    package.setLevel(before)


@pytest.mark.usefixtures("own_level")
def test_with_debug_a_traceback_stands_before_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for arguments, says_where in (([], False), (["--debug"], True)):
        monkeypatch.setattr(sys, "argv", ["epi-ds", *arguments, "recipes", "cat", "nothing"])
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: 'nothing' is none of the shipped recipes (")
        assert ("in path_of" in caplog.text) is says_where


@pytest.mark.usefixtures("own_level")
def test_ranks_of_a_recipe_are_debugged_as_the_command_is() -> None:
    shown = [
        CliRunner().invoke(command.app, [*options, "launch", "mpi", "demo", "--ranks", "2", "--dry-run"]).stdout
        for options in ([], ["--debug"])
    ]
    assert [" epi_ds.cli.main train demo" in one for one in shown] == [True, False]
    assert [" epi_ds.cli.main --debug train demo" in one for one in shown] == [False, True]


def test_a_missing_extra_is_named_for_the_verb_and_not_for_an_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setattr(sys, "argv", ["epi-ds", "--debug", "train", "demo"])
    with pytest.raises(SystemExit):
        command.main()
    assert capsys.readouterr().err == (
        "error: epi-ds train needs trl, which is not installed here: pip install 'epi-ds[train]'\n"
    )
