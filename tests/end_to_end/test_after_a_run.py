"""What follows a run: its model is talked to and pushed, with a card that says what it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support.forks import epi_ds
from tests.support.hub_writes import WRITER, serving
from tests.support.processes import Finished, checked

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]


def piped(*arguments: str, given: str = "", **environment: str) -> Finished:
    """Run the installed command with something on its standard input; its output is the standard one alone."""
    done = subprocess.run(
        [str(Path(sys.prefix) / "bin" / "epi-ds"), *arguments],
        input=given,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Finished(done.returncode, done.stdout if done.returncode == 0 else done.stderr)


def test_the_export_has_a_card_and_checkpoints_have_none(undisturbed: Path) -> None:
    assert not list((undisturbed / "checkpoints").rglob("README.md"))
    card = (undisturbed / "export" / "README.md").read_text()
    assert "None" not in card
    assert str(undisturbed.parent) not in card
    assert "| carry | table.jsonl (43 rows) | 1 | 5 | 0.001 |" in card
    assert "; on 2 ranks." in card


def test_a_run_is_talked_to_beside_its_base(undisturbed: Path, small_base: Path, tmp_path: Path) -> None:
    arguments = ("chat", str(undisturbed), "--against-base", "--max-new-tokens", "4")
    lines = checked(
        piped(*arguments, given="What is 3 + 4?\n\n/new\nWhat is 3 + 4?\n/quit\nnever asked\n")
    ).splitlines()
    names = [f"{undisturbed}:", f"{small_base}:"]
    assert [line for line in lines if line in names] == names * 2
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    once = checked(epi_ds("chat", str(undisturbed), "--once", "What is 3 + 4?", "--max-new-tokens", "4"))
    assert lines[1] in once.splitlines()
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copy(undisturbed / "recipe.json", unfinished)
    said = checked(epi_ds("chat", str(unfinished), "--once", "?"), 2)
    assert "has not ended" in said
    assert "`epi-ds export " in said


def test_a_run_is_pushed_with_its_card(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    for name in ("recipe.json", "metrics.jsonl"):
        shutil.copy(undisturbed / name, run)
    shutil.copytree(undisturbed / "export", run / "export")
    (run / "export" / "README.md").unlink()
    (run / "export" / "notes.txt").write_text("of nobody's business")
    dry = checked(epi_ds("push", str(run), "me/mine", "--dry-run"))
    assert f"card written: {run / 'export' / 'README.md'}" in dry
    assert "model.safetensors" in dry
    assert f"left out, for it is no part of a model: {run / 'export' / 'notes.txt'}" in dry
    assert "nothing was pushed" in dry
    token = tmp_path / "token"
    token.write_text(WRITER)
    with serving() as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        told = checked(piped("push", str(run), "me/mine", "--private", "--token-file", str(token), **environment))
        assert f"were there: {hub.address}/me/mine" in told
        held = hub.repos["me/mine"]
        assert hub.private == {"me/mine"}
    files = {path.name for path in (run / "export").iterdir()} - {"notes.txt"}
    assert held.keys() == files | {".gitattributes"}
    assert held["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
    assert ModelCard(held["README.md"].decode()).data.tags == ["epi_ds", "sft", "continual-learning"]
    assert not any(str(tmp_path).encode() in content or WRITER.encode() in content for content in held.values())
