"""The Hub as it is where `registry serve` is stricter: repositories of any files, and tags that anybody may move.

As much of its HTTP API as a registry uses, in memory, behind uvicorn in a thread of the test. It admits nothing, tags
nothing and knows no version. Tests reach into it to do what strangers do, and to have it fail.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import uvicorn
from hub_tools import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@dataclass(frozen=True)
class PlainCommit:
    sha: str
    tree: dict[str, bytes]
    title: str
    message: str
    at: datetime


@dataclass
class Repo:
    commits: list[PlainCommit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def add(self, tree: dict[str, bytes], title: str, message: str = "") -> str:
        parent = self.commits[-1].sha if self.commits else ""
        names = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in tree.items())
        content = json.dumps([parent, names, title, message, time.time_ns()])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits.append(PlainCommit(sha, tree, title, message, datetime.now(UTC)))
        return sha

    @property
    def head(self) -> PlainCommit:
        return self.commits[-1]

    def at(self, revision: str) -> PlainCommit | None:
        sha = self.head.sha if revision == "main" else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)


@dataclass
class Failure:
    """What happens to requests whose method and path hold `what`: `times` of them. `after`: once they took effect."""

    what: str
    status: int
    times: int = 1
    after: bool = False


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.response = JSONResponse({"error": message}, status, headers)
        if code:
            self.response.headers["X-Error-Code"] = code
        self.response.headers["X-Error-Message"] = message


class PlainHub:
    """The repositories, and a server over them between `start` and `stop`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.writers: set[str] | None = None  # the tokens that may write; None: everybody
        self.after_commit: Callable[[str], None] = lambda _: None  # called with the commit, before it is answered
        self.port = free_port()
        self._lock = threading.RLock()
        self._server = uvicorn.Server(
            uvicorn.Config(
                Starlette(routes=[Route("/{path:path}", self._answer, methods=_METHODS)]),
                port=self.port,
                log_level="error",
                lifespan="off",
            )
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _answer(self, request: Request) -> Response:
        body = await request.body()
        said = f"{request.method} {request.url.path}"
        self.requests.append(said)
        with self._lock:
            failure = next((each for each in self.failures if each.times and each.what in said), None)
            if failure is not None:
                failure.times -= 1
                if not failure.after:
                    return JSONResponse({"error": "as the test wants it"}, failure.status)
            try:
                response = self._handle(request, body)
            except Refused as refused:
                response = refused.response
            return response if failure is None else JSONResponse({"error": "lost"}, failure.status)

    def _handle(self, request: Request, body: bytes) -> Response:
        raw = request.scope["raw_path"].decode().strip("/").split("/")
        parts = [unquote(part) for part in raw]
        if parts == ["api", "validate-yaml"]:
            return JSONResponse({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            self._check_writer(request)
            return self._create(json.loads(body))
        if parts == ["api", "models"]:
            return self._list(request.query_params.get("author", ""))
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            repo = self._repo(name, request)
            if request.method != "GET" and rest[0] != "paths-info":
                self._check_writer(request)
            return self._api(name, repo, rest, request, body)
        if "resolve" in parts:
            where = parts.index("resolve")
            repo = self._repo("/".join(parts[:where]), request)
            return _file(repo, parts[where + 1], "/".join(parts[where + 2 :]), request.method == "HEAD")
        raise Refused(404, f"no such address: {request.url.path}")

    def _check_writer(self, request: Request) -> None:
        if self.writers is not None and _token(request) not in self.writers:
            raise Refused(403, "You have read access but not the required permissions for this operation")

    def _create(self, wanted: dict[str, Any]) -> Response:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repos:
            return JSONResponse({"error": "You already created this repo", "url": f"{self.endpoint}/{name}"}, 409)
        repo = self.repos[name] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.add({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return JSONResponse({"url": f"{self.endpoint}/{name}"})

    def _list(self, author: str) -> Response:
        return JSONResponse(
            [_info(name, repo, repo.head) for name, repo in self.repos.items() if name.startswith(f"{author}/")]
        )

    def _repo(self, name: str, request: Request) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and _token(request) is None):
            raise Refused(401, "Repository not found", "RepoNotFound")
        if repo.gated and "/resolve/" in request.url.path:
            raise Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        return repo

    def _api(self, name: str, repo: Repo, rest: list[str], request: Request, body: bytes) -> Response:
        what = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        if what == "refs":
            return JSONResponse(
                {
                    "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.sha}],
                    "converts": [],
                    "tags": [
                        {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()
                    ],
                }
            )
        if what == "tag" and request.method == "DELETE":
            if repo.tags.pop(revision, None) is None:
                raise Refused(404, "Tag not found", "RevisionNotFound")
            return Response()
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if what == "tag":
            tag = json.loads(body)["tag"]
            if tag in repo.tags:
                raise Refused(409, f"Tag reference exists already: {tag}")
            repo.tags[tag] = commit.sha
            return Response()
        if what == "revision":
            return JSONResponse(_info(name, repo, commit))
        if what == "tree":
            return JSONResponse([_entry(path, data) for path, data in sorted(commit.tree.items())])
        if what == "commits":
            found = repo.commits[: repo.commits.index(commit) + 1][::-1]
            return JSONResponse([_history(each) for each in found])
        if what == "preupload":
            wanted = json.loads(body)["files"]
            return JSONResponse({"files": [_mode(each["path"], commit.tree) for each in wanted]})
        if what == "commit":
            return self._commit(repo, body)
        raise Refused(404, f"no such address: {request.url.path}")

    def _commit(self, repo: Repo, body: bytes) -> Response:
        tree = dict(repo.head.tree)
        header: dict[str, Any] = {}
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                del tree[value["path"]]
            else:
                raise Refused(400, f"this hub does not know {key}")
        if header.get("parentCommit") not in (None, repo.head.sha):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        sha = repo.add(tree, header["summary"], header.get("description", ""))
        self.after_commit(sha)
        return JSONResponse({"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/x/y/commit/{sha}"})


_METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE"]


def _token(request: Request) -> str | None:
    found = request.headers.get("authorization", "").removeprefix("Bearer ")
    return found or None


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _info(name: str, repo: Repo, commit: PlainCommit) -> dict[str, Any]:
    siblings = [{"rfilename": path} for path in sorted(commit.tree)]
    at = _time(commit.at)
    return {
        "id": name,
        "sha": commit.sha,
        "private": repo.private,
        "lastModified": at,
        "siblings": siblings,
        "tags": [],
    }


def _entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if path.endswith(".safetensors"):  # as a large file is listed
        sha256 = hashlib.sha256(data).hexdigest()
        found |= {"oid": _git_oid(sha256.encode()), "lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}}
    return found


def _mode(path: str, tree: dict[str, bytes]) -> dict[str, Any]:
    oid = _git_oid(tree[path]) if path in tree else None
    return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}


def _history(commit: PlainCommit) -> dict[str, Any]:
    return {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": "somebody"}],
        "date": _time(commit.at),
    }


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.000Z")  # whole seconds, as the Hub's commits have


def _file(repo: Repo, revision: str, path: str, head_only: bool) -> Response:
    commit = repo.at(revision)
    if commit is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    if path not in commit.tree:
        raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
    data = commit.tree[path]
    headers = {"ETag": f'"{_git_oid(data)}"', "X-Repo-Commit": commit.sha, "Content-Length": str(len(data))}
    return Response(b"" if head_only else data, headers=headers)


@contextlib.contextmanager
def plain_hub() -> Iterator[PlainHub]:
    hub = PlainHub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
