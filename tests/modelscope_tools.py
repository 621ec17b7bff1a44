"""A stand-in for ModelScope: the few routes that its client reads models by, over real HTTP.

What it answers is what the site answers: an unknown revision has no files and no error, the list of files gives the
commit that last changed each, and an unknown repository is a 404 with a code of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Commit:
    """The files of a commit. `changed` says which commit last changed each path."""

    sha: str
    at: int
    files: dict[str, bytes]
    changed: dict[str, str]


@dataclass
class Repository:
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    token: str | None = None

    def commit(self, files: Mapping[str, bytes], branch: str = "master") -> str:
        """Adds a commit on a branch. Returns its SHA."""
        parent = self.commits.get(self.branches.get(branch, ""))
        made = self._next(branch)
        made.files = (parent.files if parent else {}) | files
        made.changed = (parent.changed if parent else {}) | dict.fromkeys(files, made.sha)
        return made.sha

    def merge(self, branch: str) -> str:
        """Adds a commit on master with all that `branch` changed since it began there, each path by its own commit."""
        ours, theirs = self.commits[self.branches["master"]], self.commits[self.branches[branch]]
        newer = [path for path, sha in theirs.changed.items() if sha not in ours.changed.values()]
        made = self._next("master")
        made.files = ours.files | {path: theirs.files[path] for path in newer}
        made.changed = ours.changed | {path: theirs.changed[path] for path in newer}
        return made.sha

    def _next(self, branch: str) -> Commit:
        at = 1_700_000_000 + 60 * len(self.commits)
        made = Commit(hashlib.sha1(str(at).encode()).hexdigest(), at, {}, {})
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)


class ModelScope:
    """The server for the length of a `with` block. `requests` are the paths that were asked for, with their queries."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.spoil_entry: Callable[[dict[str, Any]], None] = lambda _: None
        self.spoil_file: Callable[[str, bytes], bytes] = lambda _, data: data
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                address = urlsplit(self.path)
                hub.answer(self, address.path, dict(parse_qsl(address.query)))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo: str, files: Mapping[str, bytes], *, token: str | None = None) -> Repository:
        made = self.repositories[repo] = Repository(token=token)
        made.commit(files)
        return made

    def fetched(self) -> list[tuple[str, str]]:
        """The files that were downloaded, each with the revision that it was asked for by."""
        return sorted((query["FilePath"], query["Revision"]) for path, query in self.requests if path.endswith("/repo"))

    def answer(self, handler: BaseHTTPRequestHandler, path: str, query: dict[str, str]) -> None:
        self.requests.append((path, query))
        if self.status != 200:
            return _send_json(handler, self.status, {"Code": self.status, "Message": "out of order", "Success": False})
        for name, repository in self.repositories.items():
            route = path.removeprefix(f"/api/v1/models/{name}/")
            if route != path:
                given = handler.headers.get("Authorization")
                if repository.token is not None and given != f"Bearer {repository.token}":
                    break  # the site does not tell a private repository from none
                return self._answer(handler, repository, route, query)
        return _send_json(
            handler, 404, {"Code": 10010205001, "Message": "record not found", "Success": False, "RequestId": "1"}
        )

    def _answer(
        self, handler: BaseHTTPRequestHandler, repository: Repository, route: str, query: dict[str, str]
    ) -> None:
        commit = repository.at(query.get("Revision", "master"))
        if route == "revisions":
            revisions = {
                "Branches": [{"Revision": name} for name in repository.branches],
                "Tags": [{"Revision": name} for name in repository.tags],
            }
            return _send_data(handler, {"RevisionMap": revisions})
        if route == "repo/files":
            if commit is None:
                return _send_data(handler, {"Files": None, "IsVisual": 0, "LatestCommitter": None})
            return _send_data(handler, {"Files": self._entries(repository, commit), "IsVisual": 0})
        data = commit.files.get(query.get("FilePath", "")) if route == "repo" and commit else None
        if data is None:
            return _send_json(handler, 404, {"Code": 10990101007, "Message": "file not found", "Success": False})
        return _send_bytes(handler, self.spoil_file(query["FilePath"], data))

    def _entries(self, repository: Repository, commit: Commit) -> list[dict[str, Any]]:
        folders = sorted({path.rpartition("/")[0] for path in commit.files} - {""})
        entries: list[dict[str, Any]] = [{"Path": folder, "Type": "tree", "Size": 0} for folder in folders]
        for path, data in sorted(commit.files.items()):
            changed = repository.commits[commit.changed[path]]
            entry = {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Type": "blob",
                "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(),
                "Revision": changed.sha,
                "CommittedDate": changed.at,
                "IsLFS": path.endswith(".safetensors"),
            }
            self.spoil_entry(entry)
            entries.append(entry)
        return entries


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _send_data(handler: BaseHTTPRequestHandler, data: Any) -> None:
    _send_json(handler, 200, {"Code": 200, "Data": data, "Message": "success", "RequestId": "1", "Success": True})


def _send_json(handler: BaseHTTPRequestHandler, status: int, body: Any) -> None:
    _send_bytes(handler, json.dumps(body).encode(), status, "application/json")


def _send_bytes(
    handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, kind: str = "application/octet-stream"
) -> None:
    begin = 0
    asked = handler.headers.get("Range", "")
    if status == 200 and asked.startswith("bytes="):
        begin, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data) - begin))
    if status == 206:
        handler.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
    handler.end_headers()
    handler.wfile.write(data[begin:])
