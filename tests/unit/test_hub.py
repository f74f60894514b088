"""Data sets of the hub, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate([7, 0.5, "2024-01-05", 'é "x"'])]
FILES = {
    "README.md": b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n"
    b"  - split: test\n    path: main/test.jsonl\n---\n",
    "main/train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "main/test.jsonl": json.dumps(ROWS[0]).encode(),
}
# Reads a data set in a process of its own: the hub's address is read once, when libraries are imported.
PROGRAM = """
import sys
from epi_ds.data.sources import find_files
from epi_ds.data.table import Reading, Table, read_table
from epi_ds.errors import RemedyError, UserError
name, subset, split = sys.argv[1:]
try:
    files = find_files(name, subset=subset or None, split=split)
    table = Table(name=name, files=files, split=split)
    print([row.answer for _, row in read_table(table, Reading())])
except (UserError, RemedyError) as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """One data set, ``me/rows``."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        wanted = json.loads(self.rfile.read(size) or b"{}").get("paths", [])
        self._json([one for one in tree() if one["path"] in wanted])

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith("/api/datasets/me/rows/tree/"):
            folder = path.removeprefix("/api/datasets/me/rows/tree/").partition("/")[2]
            self._json([one for one in tree() if not folder or one["path"].startswith(f"{folder}/")])
        elif path.startswith("/api/datasets/me/rows"):
            siblings = [{"rfilename": name} for name in FILES]
            self._json(
                {"id": "me/rows", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            )
        elif path.startswith("/datasets/me/rows/resolve/"):
            content = FILES.get(path.removeprefix("/datasets/me/rows/resolve/").partition("/")[2])
            self._file(content, body=body)
        else:
            self._missing("RepoNotFound")

    def _file(self, content: bytes | None, *, body: bool) -> None:
        if content is None:
            self._missing("EntryNotFound")
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def tree() -> list[dict[str, Any]]:
    files = [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in FILES.items()
    ]
    return [*files, {"type": "directory", "path": "main", "oid": "0" * 40, "size": 0}]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(address: str, folder: Path, *, name: str = "me/rows", subset: str = "", split: str = "train") -> str:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "HF_HOME": str(folder / "hub"),
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, subset, split],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_a_split_is_read_as_it_was_written(address: str, tmp_path: Path) -> None:
    assert ask(address, tmp_path) == str(["7", "0.5", "2024-01-05", 'é "x"'])
    assert ask(address, tmp_path, subset="main", split="test") == "['7']"
    assert ask(address, tmp_path, split="train[1:3]") == str(["0.5", "2024-01-05"])


@pytest.mark.slow
def test_what_is_not_there_is_told(address: str, tmp_path: Path) -> None:
    said = ask(address, tmp_path, split="tset")
    assert said.startswith("UserError me/rows has no split 'tset'; did you mean 'test'?")
    said = ask(address, tmp_path, name="me/other")
    assert said.startswith("UserError me/other is neither a file here nor a data set of the hub")
    said = ask("http://127.0.0.1:1", tmp_path / "empty")
    assert said.startswith("RemedyError me/rows is no file here, and the hub cannot be reached")
    assert "\n" not in said
