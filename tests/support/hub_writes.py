"""A server on this machine that takes models as the Hugging Face hub does: without Xet, by its commits and Git LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

import yaml

WRITER, READER = "hf_token_that_may_write", "hf_token_that_may_read"
OWNER = "me"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Others are kept by Git LFS.
_REGULAR = (".json", ".md", ".jinja", ".txt", ".gitattributes")


class HubServer(ThreadingHTTPServer):
    """Repositories of models: their files, and who may see them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        """What Git LFS keeps, by its digest."""
        self.messages: list[str] = []
        """Of commits."""
        self.is_down = False
        """Whether every request is answered by an error of the server."""
        self.is_full = False
        """Whether large files are refused."""

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[HubServer]:
    """Yield a hub without repositories."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        if not self._may(WRITER, READER):
            return
        repo, _, tree = urlparse(self.path).path.removeprefix("/api/models/").partition("/tree/")
        if repo not in self.server.repos:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        if tree:
            self._answer(200, [_entry(name, content) for name, content in self.server.repos[repo].items()])
            return
        siblings = [_sibling(name, content) for name, content in self.server.repos[repo].items()]
        private = repo in self.server.private
        self._answer(200, {"id": repo, "sha": _COMMIT, "siblings": siblings, "private": private, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(self.path).path
        if not self._may(WRITER, READER):
            return
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif not self._may(WRITER):
            return
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer(200, {"files": [_upload_mode(one["path"]) for one in files]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._lfs_action(one) for one in json.loads(body)["objects"]]
            self._answer(200, {"transfer": "basic", "objects": objects})
        else:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(content).hexdigest()
        assert self.path == f"/large/{digest}"
        if self.server.is_full:
            self._answer(413, {"error": "Your storage is full"})
            return
        self.server.large[digest] = content
        self._answer(200, {})

    def _validate(self, card: str) -> None:
        try:
            yaml.safe_load(card.split("---")[1])
        except yaml.YAMLError:
            self._answer(400, {"error": "Invalid YAML", "errors": [{"message": "the front matter is no YAML"}]})
        else:
            self._answer(200, {"errors": [], "warnings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != OWNER:
            self._answer(403, {"error": f"You have no rights in the namespace {wanted['organization']}"})
            return
        self.server.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if wanted.get("visibility") == "private":
            self.server.private.add(repo)
        self._answer(200, {"url": f"{self.server.address}/{repo}"})

    def _lfs_action(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.server.large:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}}

    def _commit(self, repo: str, body: bytes) -> None:
        files = dict(self.server.repos[repo])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        self.server.repos[repo] = files
        url = f"{self.server.address}/{repo}/commit/{_COMMIT}"
        self._answer(200, {"success": True, "commitOid": _COMMIT, "commitUrl": url})

    def _may(self, *tokens: str) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.is_down:
            self._answer(500, {"error": "Internal error"})
        elif given not in (WRITER, READER):
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif given not in tokens:
            self._answer(403, {"error": "This token has no write access"})
        else:
            return True
        return False

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        told = {"X-Error-Message": value["error"]} if isinstance(value, dict) and "error" in value else {}
        self.send_response(status)
        for name, text in {**(headers or {}), **told, "Content-Type": "application/json"}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def _is_regular(name: str) -> bool:
    return name.endswith(_REGULAR)


def _upload_mode(name: str) -> dict[str, Any]:
    return {"path": name, "uploadMode": "regular" if _is_regular(name) else "lfs", "shouldIgnore": False, "oid": None}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if not _is_regular(name):
        digest = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
    return found
