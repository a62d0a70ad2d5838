"""A server on this machine that speaks the calls of the Hub: create, branch, upload, commit, list, download.

It keeps everything in memory, and every body it was sent, so that a test can look for what must not have left. Files
go up as on the Hub: small texts inside the commit, weights and tables first by the LFS protocol, named by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "Abcdefghij0123456789" + "abcd"
LARGE = (".safetensors", ".parquet")


@dataclass
class Repo:
    """A repository: visibility, the files of every commit, the commit each branch stands at."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        seed = repr((branch, len(self.commits), sorted(files))).encode()
        oid = hashlib.sha1(seed).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server holds and was sent.

    Args:
        url: Its address.
        repos: Name -> repository.
        blobs: SHA-256 -> uploaded bytes.
        calls: "METHOD path" of every request.
        bodies: Every request body.
        broken: Path of an endpoint that answers with an internal error.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    broken: str = ""
    lock: Any = field(default_factory=Lock)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes at a revision."""
        found = self.repos[repo]
        return found.commits[found.at(revision) or ""]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def _handle(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.calls.append(f"{method} {path}")
            self.hub.bodies.append(body)
            if self.hub.broken and self.hub.broken in path:
                self._answer(500, {"error": "broken on purpose"})
            elif (
                method in ("POST", "PUT")
                and self.headers.get("Authorization") != f"Bearer {TOKEN}"
                and "/lfs/" not in path
            ):
                self._answer(401, {"error": "Invalid credentials"})
            else:
                self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[:1] == ["lfs"]:
            self._receive_blob(parts[1], body)
        elif parts[0] != "api" and ".git" in path:
            self._batch(json.loads(body))
        else:
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            repo = self.hub.repos.get(name)
            if repo is None:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif parts[0] == "api":
                self._repo_call(repo, name, parts[4:], body)
            else:
                self._file(method, repo, parts[3], "/".join(parts[4:]))

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo(private=asked.get("visibility") == "private"))
        self._answer(409 if known else 200, {"url": f"{self.hub.url}/{name}"})

    def _repo_call(self, repo: Repo, name: str, call: list[str], body: bytes) -> None:
        if call[:1] == ["branch"]:
            known = call[1] in repo.branches
            repo.branches.setdefault(call[1], repo.branches["main"])
            self._answer(409 if known else 201, {})
            return
        revision = call[1] if len(call) > 1 else "main"
        at = repo.at(revision)
        if at is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif call[:1] in ([], ["revision"]):
            siblings = [{"rfilename": path} for path in repo.commits[at]]
            self._answer(200, {"id": name, "sha": at, "private": repo.private, "siblings": siblings, "tags": []})
        elif call[0] == "tree":
            self._answer(200, [_entry(path, data) for path, data in repo.commits[at].items()])
        elif call[0] == "preupload":
            self._answer(200, {"files": [_mode(file, repo.commits[at]) for file in json.loads(body)["files"]]})
        elif call[0] == "commit":
            self._commit(repo, name, revision, dict(repo.commits[at]), body)
        else:
            self._answer(404, {"error": f"no call {call}"})

    def _commit(self, repo: Repo, name: str, revision: str, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            href = f"{self.hub.url}/lfs/{one['oid']}"
            actions = {} if one["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append({**one, **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _receive_blob(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "other bytes than announced"})
            return
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def _file(self, method: str, repo: Repo, revision: str, path: str) -> None:
        at = repo.at(revision)
        data = repo.commits[at].get(path) if at else None
        if data is None or at is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": at, "ETag": f'"{_entry(path, data)["oid"]}"'}
        self._answer(200, data, headers, silent=method == "HEAD")

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None, *, silent: bool = False) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not silent and self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _mode(file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    large = file["path"].endswith(LARGE)
    known = files.get(file["path"])
    oid = None if known is None or large else _entry(file["path"], known)["oid"]
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The server, answering on a free port of the loopback interface."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, cache: object) -> dict[str, str]:
    """Variables with which a fresh process talks to the server alone."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip


def use_here(hub: Hub, cache: object, monkeypatch: pytest.MonkeyPatch, *, token: bool = True) -> None:
    """Make the Hub's client of this process talk to the server; it read its variables when it was imported."""
    from huggingface_hub import close_session, constants

    for name, value in environment(hub, cache).items():
        monkeypatch.setenv(name, value)
    if token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "/no-token")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
