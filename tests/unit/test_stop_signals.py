"""Signals by which a process is told to end, and when Slurm ends its job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from epi_ds.launch import stop_signals
from epi_ds.launch.time_limit import end_of_job, job_of, parse_end


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    stop_signals.stop_listening()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop_signals.listen()
    assert stop_signals.received() is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGCONT)
    assert stop_signals.received() is number
    # The first one counts.
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_signals.received() is number
    stop_signals.stop_listening()
    assert stop_signals.received() is None
    assert signal.getsignal(number) is before


def test_the_handler_of_somebody_else_is_called_too() -> None:
    heard: list[int] = []
    own = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        stop_signals.listen()
        # Once, also where two of us listen.
        stop_signals.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
        assert stop_signals.received() is signal.SIGUSR1
    finally:
        stop_signals.stop_listening()
        signal.signal(signal.SIGUSR1, own)


def test_another_thread_cannot_listen_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    thread = threading.Thread(target=stop_signals.listen)
    thread.start()
    thread.join()
    assert "SIGTERM and SIGUSR1 end this process without a checkpoint" in caplog.text


def test_a_process_that_ends_by_itself_is_not_ended_by_others() -> None:
    """Not while Python ends either, when handlers are gone already: the exit code would be the signal's."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from epi_ds.launch import stop_signals
        class Last:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
        # In a module, and so deleted after the handlers were reset.
        sys.modules["last"] = last = type(sys)("last")
        last.one = Last()
        stop_signals.listen()
        stop_signals.be_deaf()
        os.kill(os.getpid(), signal.SIGUSR1)
        sys.exit(stop_signals.REQUEUE_EXIT_CODE)
        """
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 85


def test_a_rank_ends_before_python_is_torn_down_and_after_everything_else() -> None:
    script = textwrap.dedent(
        """
        import atexit, sys, threading, time
        from epi_ds.launch.teardown import skip_teardown
        class Last:
            def __del__(self):
                print("torn down", file=sys.__stdout__)
        sys.modules["last"] = last = type(sys)("last")
        last.one = Last()
        atexit.register(print, "first handler", end="")
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
        skip_teardown(85)
        try:
            raise SystemExit(3)
        finally:
            print("block")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["block", "thread", "first handler"]
    assert done.returncode == 85


def test_the_end_of_a_job_is_read() -> None:
    expected = datetime(2026, 11, 25, 18, 0, 0, tzinfo=UTC).timestamp()
    assert parse_end("2026-11-25T18:00:00") == expected
    assert parse_end("N/A") is None
    for nothing in ("", "2026-11-25T18:00:00\n2026-11-25T18:00:00"):
        with pytest.raises(ValueError, match="isoformat"):
            parse_end(nothing)
    assert end_of_job({}) is None


def test_a_task_of_an_array_goes_by_its_place() -> None:
    assert job_of({}) is None
    assert job_of({"SLURM_JOB_ID": "9"}) == "9"
    assert job_of({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}) == "9_2"


def test_where_slurm_s_programs_are_missing_its_variable_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container. Without either nobody would save in time, which is said."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert end_of_job({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000000"}) == 1_800_000_000
    assert not caplog.messages
    assert end_of_job({"SLURM_JOB_ID": "7"}) is None
    assert "when job 7 ends is not known" in caplog.text
    assert "--signal=USR1@120" in caplog.text
    # A controller that was there before, and is busy now that the end is near.
    assert end_of_job({"SLURM_JOB_ID": "7"}, known=5.0) == 5.0
