"""What is pushed of an exported model, and what is said of what is in the way, against a hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from epi_ds.errors import UserError
from epi_ds.report.hub import check_repo, token_of
from epi_ds.report.hub_files import package_of, staged
from tests.support.hub_writes import READER, WRITER, HubServer, serving

# In a process of its own: the hub's address and the environment are read once, when its library is imported.
PROGRAM = """
import json, sys
from pathlib import Path
from epi_ds.errors import RemedyError, UserError
from epi_ds.report.hub import push_folder
for line in sys.stdin:
    asked = {"private": False, "overwrite": False, "message": "push", **json.loads(line)}
    try:
        answer = push_folder(Path(asked.pop("folder")), asked.pop("repo"), **asked)._asdict()
    except (UserError, RemedyError) as error:
        answer = {"error": type(error).__name__, "said": str(error)}
    print("ANSWER", json.dumps(answer))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_in(tmp_path / "model", weights=b"weights")


def model_in(folder: Path, *, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    return folder


def pushes(address: str, home: Path, asked: Sequence[dict[str, Any]], **environment: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="".join(json.dumps({"token": WRITER, **one}, default=str) + "\n" for one in asked),
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(home),
            "HF_HOME": str(home / "hub"),
            "HF_ENDPOINT": address,
            # Its protocol is a service of its own.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": ":".join(sys.path),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if line.startswith("ANSWER")]


@pytest.mark.slow
def test_a_model_is_pushed_once_and_never_over_another(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    other = model_in(tmp_path / "other", weights=b"another")
    (other / "config.json").write_text("{}")
    started = model_in(tmp_path / "started", weights=b"weights")
    (started / "tokenizer.json").write_text("{}")
    first, again, more, refused, forced, hidden, public = pushes(
        hub.address,
        tmp_path,
        [
            {"folder": folder, "repo": "me/one"},
            {"folder": folder, "repo": "me/one"},
            # As after an interruption: what is there is of this model.
            {"folder": started, "repo": "me/one"},
            {"folder": other, "repo": "me/one"},
            {"folder": other, "repo": "me/one", "overwrite": True},
            {"folder": folder, "repo": "me/hidden", "private": True},
            {"folder": folder, "repo": "me/one", "private": True},
        ],
    )
    assert first == {"url": f"{hub.address}/me/one", "num_files": 3}
    assert again == {"url": f"{hub.address}/me/one", "num_files": 0}
    assert more["num_files"] == 1
    assert refused["error"] == "UserError"
    assert "me/one exists and holds something else (config.json, model.safetensors, tokenizer.json)" in refused["said"]
    assert forced["num_files"] == 2
    held = {name: content for name, content in hub.repos["me/one"].items() if name != ".gitattributes"}
    assert held == {path.name: path.read_bytes() for path in other.iterdir()}
    assert hub.messages == ["push"] * 4
    assert "error" not in hidden
    assert hub.private == {"me/hidden"}
    assert public["said"].startswith("me/one exists and is public, and --private is for one that is made now")


@pytest.mark.slow
def test_what_is_in_the_way_is_one_message(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    before = dict(hub.repos)
    broken = model_in(tmp_path / "broken", weights=b"of a broken card")
    (broken / "README.md").write_text("---\ntags: [\n---\n")
    large = model_in(tmp_path / "large", weights=b"of no room")
    hub.is_full = True
    unknown, reader, stranger, card, full = pushes(
        hub.address,
        tmp_path,
        [
            {"folder": folder, "repo": "me/two", "token": "hf_nobody_knows_this"},
            {"folder": folder, "repo": "me/two", "token": READER},
            {"folder": folder, "repo": "others/two"},
            {"folder": broken, "repo": "me/broken"},
            {"folder": large, "repo": "me/large"},
        ],
    )
    hub.is_full = False
    # Made, and still without a file of ours.
    new = {"me/broken", "me/large"}
    assert hub.repos.keys() - before.keys() == new
    assert all(list(hub.repos[name]) == [".gitattributes"] for name in new)
    hub.is_down = True
    (down,) = pushes(hub.address, tmp_path, [{"folder": folder, "repo": "me/two"}])
    hub.is_down = False
    (absent,) = pushes("http://127.0.0.1:1", tmp_path, [{"folder": folder, "repo": "me/two"}])
    (offline,) = pushes(hub.address, tmp_path, [{"folder": folder, "repo": "me/two"}], HF_HUB_OFFLINE="1")
    answers = (unknown, reader, stranger, card, full, down, absent, offline)
    said = [one["said"] for one in answers]
    assert all("\n" not in one and "hf_" not in one for one in said)
    assert said[0].startswith("the hub does not know the token (Invalid credentials")
    assert said[1].startswith("the token may not write to me/two (This token has no write access)")
    assert said[2].startswith("the token may not write to others/two")
    assert said[3].startswith("the hub does not take the card")
    assert "the front matter is no YAML" in said[3]
    assert said[4].startswith("the hub answered 413 to the push to me/large (Your storage is full)")
    assert said[5].startswith("the hub answered 500")
    assert said[6].startswith("the hub cannot be reached")
    assert said[7].startswith("HF_HUB_OFFLINE is set")
    assert [one["error"] for one in answers] == ["UserError"] * 4 + ["RemedyError"] * 4


def test_a_token_is_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{WRITER}\n")
    assert token_of(file) == WRITER
    with pytest.raises(UserError, match="cannot be read"):
        token_of(tmp_path / "absent")
    file.write_text("my token\n")
    with pytest.raises(UserError, match="is to hold a token and nothing else, and it has 2 words") as told:
        token_of(file)
    assert "my token" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert token_of(None) == READER


@pytest.mark.parametrize("repo", ["model", "me/my model", "a/b/c", "me/", "../me/model"])
def test_a_repository_has_an_owner_and_a_name(repo: str) -> None:
    check_repo("me/my-model.v2")
    with pytest.raises(UserError, match="is no repository of the hub; give OWNER/NAME"):
        check_repo(repo)


def test_files_of_a_model_are_staged_and_nothing_else(folder: Path) -> None:
    adapter = {"base_model_name_or_path": "/home/me/models/base", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for name in (".env", "notes.txt", "optimizer.pt"):
        (folder / name).write_text("hf_secret")
    (folder / "checkpoint-1").mkdir()
    package = package_of(folder)
    left_out = {path.name for path in package.left_out}
    assert left_out == {".env", "notes.txt", "optimizer.pt", "checkpoint-1"}
    with staged(package) as files:
        names = {path.name for path in files.iterdir()}
        assert names == {"README.md", "adapter_config.json", "config.json", "model.safetensors"}
        assert json.loads((files / "adapter_config.json").read_text()) == {**adapter, "base_model_name_or_path": "base"}
        assert (files / "model.safetensors").read_bytes() == b"weights"
        # What names no path is sent as it is, to the byte.
        assert (files / "config.json").is_symlink()
