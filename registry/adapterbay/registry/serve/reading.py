"""Reading: who am I, which adapters, what is in one, its refs and its history."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterbay.registry.errors import AdapterbayError
from adapterbay.registry.local.commits import Commit
from adapterbay.registry.manifest import README_FILE
from adapterbay.registry.serve import metadata
from adapterbay.registry.serve.body import read_form
from adapterbay.registry.serve.problems import entry_not_found, not_implemented, repository_not_found
from adapterbay.registry.serve.repository import MAIN, Repositories, is_servable
from adapterbay.registry.serve.server import Server, flag, next_page, of, parameter

MODELS_PAGE: Final = 500
TREE_PAGE: Final = 1000
EXPANDED_PAGE: Final = 50
COMMITS_PAGE: Final = 50
HISTORY_DEPTH: Final = 2000
MAX_CARD_BYTES: Final = 4 * 2**20

_FILTERS_WE_HAVE: Final = frozenset(
    {"search", "author", "filter", "pipeline_tag", "limit", "full", "cardData", "config", "expand", "cursor"}
)


def whoami(request: Request) -> Response:
    """The token's name, as a user."""
    caller = of(request).gate.reader(request)
    return JSONResponse(
        {
            "type": "user",
            "id": caller.name,
            "name": caller.name,
            "fullname": caller.name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": {"displayName": caller.name, "role": caller.scope}},
        }
    )


def auth_check(request: Request) -> Response:
    """200 if the caller may read, or write, the adapter."""
    server, name = of(request), parameter(request, "repo")
    server.gate.reader(request, name)
    server.repositories.head(name)
    if request.url.path.endswith("/write"):
        server.gate.writer(request, name)
    return JSONResponse({})


def models(request: Request) -> Response:
    """The adapters that the caller may see, by name, in pages."""
    server, query = of(request), request.query_params
    caller = server.gate.reader(request)
    unknown = sorted(set(query) - _FILTERS_WE_HAVE)
    if unknown:
        raise not_implemented(f"the filter {unknown[0][:40]} is")
    limit = min(int(query["limit"]), MODELS_PAGE) if query.get("limit", "").isdigit() else MODELS_PAGE
    found: list[dict[str, Any]] = []
    if limit == 0:
        return JSONResponse(found)
    last = query.get("cursor", "")
    for name in _names(server.repositories, f"{query['author']}/" if query.get("author") else "", last):
        if len(found) == limit:
            return JSONResponse(found, headers=next_page(request, cursor=last))
        last = name
        if is_servable(name) and caller.sees(name) and query.get("search", "").lower() in name:
            info = _summary(server, name)
            if info is not None and _matches(info, query.getlist("filter"), query.get("pipeline_tag")):
                found.append(info)
    return JSONResponse(found)


def _names(repositories: Repositories, prefix: str, after: str) -> Iterator[str]:
    while names := repositories.log.names(prefix, after, MODELS_PAGE):
        yield from names
        after = names[-1]


def _summary(server: Server, name: str) -> dict[str, Any] | None:
    """An adapter in a list; None if all its versions were deleted."""
    commit = server.repositories.head(name)
    return None if server.repositories.deletion(commit) is not None else _info(server, commit, blobs=False)


def _matches(info: dict[str, Any], filters: list[str], pipeline: str | None) -> bool:
    wanted = [part for each in filters for part in each.split(",") if part]
    return all(each in info["tags"] for each in wanted) and pipeline in (None, info.get("pipeline_tag"))


def model(request: Request) -> Response:
    """One adapter, at a revision or at its head."""
    server, commit = _commit(request)
    return JSONResponse(_info(server, commit, blobs=flag(request, "blobs")))


def _info(server: Server, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    first = server.repositories.log.until(commit.name, 1, 1)
    created = first[0].at if first else commit.at
    return metadata.model_info(commit, created, _card(server, commit), private=server.private, blobs=blobs)


def tree(request: Request) -> Response:
    """The files and folders below a folder, in pages."""
    server, commit = _commit(request)
    folder = parameter(request, "path").strip("/") if "path" in request.path_params else ""
    recursive, expand = flag(request, "recursive"), flag(request, "expand")
    prefix = f"{folder}/" if folder else ""
    inside = [path for path in commit.tree if path.startswith(prefix)]
    if folder and not inside:
        raise entry_not_found(f"{commit.name} has no folder {folder[:200]!r} at {commit.sha[:12]}.", commit.sha)
    below = [each for each in metadata.folders(inside) if each.startswith(prefix)]
    shown = sorted(path for path in [*inside, *below] if recursive or "/" not in path.removeprefix(prefix))
    after = request.query_params.get("cursor", "")
    size = EXPANDED_PAGE if expand else TREE_PAGE
    page = [path for path in shown if path > after][: size + 1]
    headers = next_page(request, cursor=page[size - 1]) if len(page) > size else None
    return JSONResponse(_entries(server, commit, page[:size], expand), headers=headers)


async def paths_info(request: Request) -> Response:
    """The files and folders with the given paths; those that are not there are left out."""
    sizes = of(request).settings.sizes
    server, commit = await run_in_threadpool(_commit, request)
    form = await read_form(request, sizes.document_bytes, sizes.idle_seconds)
    expand = form.get("expand", ["false"])[0].lower() == "true"
    there = {*commit.tree, *metadata.folders(commit.tree)}
    wanted = [path for path in dict.fromkeys(each.strip("/") for each in form.get("paths", [])) if path in there]
    return JSONResponse(await run_in_threadpool(_entries, server, commit, wanted, expand))


def refs(request: Request) -> Response:
    """The one branch, and the versions and aliases as tags."""
    server, name = of(request), parameter(request, "repo")
    server.gate.reader(request, name)
    head = server.repositories.head(name)
    document: dict[str, Any] = {
        "branches": [{"name": MAIN, "ref": f"refs/heads/{MAIN}", "targetCommit": head.sha}],
        "converts": [],
        "tags": [
            {"name": tag.name, "ref": f"refs/tags/{tag.name}", "targetCommit": tag.sha}
            for tag in server.repositories.tags(name)
        ],
    }
    if flag(request, "include_prs"):
        document["pullRequests"] = []
    return JSONResponse(document)


def commits(request: Request) -> Response:
    """The history of a revision, the newest first, in pages."""
    server, commit = _commit(request)
    query = request.query_params
    page = int(query["p"]) if query.get("p", "").isdigit() else 0
    limit = min(int(query["limit"]), 1000) if query.get("limit", "").isdigit() else COMMITS_PAGE
    limit = max(limit, 1)
    newest = commit.number - page * limit
    found = server.repositories.log.until(commit.name, newest, limit) if newest > 0 else []
    formatted = "formatted" in query.getlist("expand[]")
    headers = {"X-Total-Count": str(commit.number)}
    if newest > limit:
        headers |= next_page(request, p=str(page + 1))
    return JSONResponse([_history_entry(each, formatted) for each in found], headers=headers)


def _history_entry(commit: Commit, formatted: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author}],
        "date": metadata.time(commit.at),
    }
    if formatted:
        entry["formatted"] = {"title": html.escape(commit.title), "message": html.escape(commit.message)}
    return entry


def _commit(request: Request) -> tuple[Server, Commit]:
    """The commit that the address names, for a caller who may read it."""
    server, name = of(request), parameter(request, "repo")
    server.gate.reader(request, name)
    if "revision" in request.path_params:
        return server, server.repositories.find(name, parameter(request, "revision"))
    return server, server.repositories.head(name)


def _card(server: Server, commit: Commit) -> dict[str, Any]:
    """The front matter of a commit's README.md; empty if there is none that can be read."""
    entry = commit.tree.get(README_FILE)
    if entry is None or entry[1] > MAX_CARD_BYTES:
        return {}
    try:
        return metadata.front_matter(server.repositories.log.check_blob(*entry, README_FILE).read_bytes())
    except (metadata.FrontMatterError, AdapterbayError):
        return {}


def _entries(server: Server, commit: Commit, paths: list[str], expand: bool) -> list[dict[str, Any]]:
    entries = [
        metadata.file_entry(path, commit.tree[path])
        if path in commit.tree
        else metadata.folder_entry(path, commit.tree)
        for path in paths
    ]
    if expand:
        last = _last_commits(server.repositories, commit, paths)
        for entry in entries:
            found = last[entry["path"]]
            entry["lastCommit"] = {"id": found.sha, "title": found.title, "date": metadata.time(found.at)}
    return entries


def _last_commits(repositories: Repositories, commit: Commit, paths: list[str]) -> dict[str, Commit]:
    """The commit that changed each path last."""
    history = repositories.log.until(commit.name, commit.number, HISTORY_DEPTH)
    left, found = set(paths), dict.fromkeys(paths, history[-1])
    for newer, older in itertools.pairwise(history):
        for path in list(left):
            if _below(newer, path) != _below(older, path):
                found[path] = newer
                left.discard(path)
        if not left:
            break
    return found


def _below(commit: Commit, path: str) -> dict[str, tuple[str, int]]:
    return {each: entry for each, entry in commit.tree.items() if each == path or each.startswith(f"{path}/")}


def commit_page(request: Request) -> Response:
    """What a commit's address leads to."""
    _, commit = _commit(request)
    document = _history_entry(commit, formatted=False)
    document |= {"parent": commit.parent, "version": commit.version, "files": sorted(commit.tree)}
    return JSONResponse(document)


def missing(request: Request) -> Response:
    """The page of a repository, which is for people with a browser: only says where the data is."""
    name = parameter(request, "repo")
    of(request).gate.reader(request, name)
    if not of(request).repositories.exists(name):
        raise repository_not_found(f"There is no adapter {name[:200]} in this registry.")
    return JSONResponse({"id": name, "info": f"/api/models/{name}"})
