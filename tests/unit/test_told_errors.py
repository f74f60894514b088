"""What the command says of an error, and the exit code it ends with."""

from __future__ import annotations

import pytest

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
