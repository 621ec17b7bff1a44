"""Writing: repositories, tags, what to upload how, and commits."""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path, PurePosixPath
from typing import Any, Final

from anyio import to_thread
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterbay.registry.admission import check_path, check_prefix
from adapterbay.registry.admission.folder import is_trainer_state
from adapterbay.registry.errors import Conflict, Rejected
from adapterbay.registry.hub.names import moved_from
from adapterbay.registry.local.blobs import Staging
from adapterbay.registry.local.commits import Commit
from adapterbay.registry.serve import metadata
from adapterbay.registry.serve.auth import Caller
from adapterbay.registry.serve.body import chunks, read_json
from adapterbay.registry.serve.incoming import Incoming
from adapterbay.registry.serve.ndjson import CommitParser
from adapterbay.registry.serve.problems import Refusal, header_text, not_implemented
from adapterbay.registry.serve.repository import MAIN
from adapterbay.registry.serve.server import Server, address, flag, of, parameter, warning
from adapterbay.registry.serve.uploads import Allowance, FileSink

BASE64_GROWTH: Final = 4 / 3


async def create(request: Request) -> Response:
    """`create_repo`: an adapter without files. A name of one part goes below the caller's own name, as on the Hub."""
    server = of(request)
    caller = server.gate.writer(request)
    document = await _json(request, server)
    _only_models(document)
    name = _repository(document, caller)
    server.gate.writer(request, name)
    try:
        await run_in_threadpool(server.repositories.create, name, caller.name)
    except Conflict as error:
        # The clients read the address of the answer with exist_ok.
        body = {"error": error.message, "url": address(request, name), "name": name}
        return JSONResponse(body, 409, {"X-Error-Message": header_text(error.message)})
    headers = None
    if document.get("visibility") == "public" and server.private:
        headers = warning("visibility", f"{name}: who may read is decided by the tokens of this registry")
    return JSONResponse({"url": address(request, name), "name": name}, headers=headers)


async def delete(request: Request) -> Response:
    """`delete_repo`: not offered, since versions that somebody uses would go with it."""
    server = of(request)
    server.gate.writer(request)
    raise not_implemented(
        "deleting a whole repository is", "The operator deletes single versions with `registry delete NAME@N`."
    )


def _repository(document: dict[str, Any], caller: Caller) -> str:
    organization, name = document.get("organization"), document.get("name")
    if not isinstance(name, str) or not isinstance(organization, str | None):
        raise Refusal(400, "The name of the repository is missing.", reason="BAD_NAME")
    if organization is None:
        if caller.token is None:
            raise Refusal(400, f"Say whose {name[:96]!r} it is: team/{name[:96]}.", reason="BAD_NAME")
        organization = caller.name
    return f"{organization}/{name}"


def _only_models(document: dict[str, Any]) -> None:
    kind = document.get("type") or "model"
    if kind != "model":
        raise not_implemented(f"repositories of type {str(kind)[:40]} are")


async def add_tag(request: Request) -> Response:
    """`create_tag`: an alias at a version's commit. With the message of `move_message` it is moved at one instant."""
    server, name = of(request), parameter(request, "repo")
    caller = server.gate.writer(request, name)
    document = await _json(request, server)
    tag = document.get("tag")
    if not isinstance(tag, str):
        raise Refusal(400, "The name of the tag is missing.", reason="BAD_TAG")

    def work() -> None:
        commit = server.repositories.find(name, parameter(request, "revision"))
        server.repositories.add_tag(name, tag, commit, caller.name, moved_from(document.get("message")))

    await run_in_threadpool(work)
    return JSONResponse({})


def remove_tag(request: Request) -> Response:
    """`delete_tag`: an alias goes, the version stays."""
    server, name = of(request), parameter(request, "repo")
    caller = server.gate.writer(request, name)
    server.repositories.remove_tag(name, parameter(request, "tag"), caller.name)
    return JSONResponse({})


async def branch(request: Request) -> Response:
    """`create_branch` and `delete_branch`: there is `main`, and no other."""
    server, name, wanted = of(request), parameter(request, "repo"), parameter(request, "branch")
    server.gate.writer(request, name)
    await run_in_threadpool(server.repositories.head, name)
    if wanted == MAIN:
        if request.method == "POST":
            raise Refusal(409, "The branch main is there.")
        raise Refusal(400, "The branch main cannot be deleted.")
    raise not_implemented(
        f"the branch {wanted[:100]!r}, like any but main, is", "Commit to main; mark versions with tags (aliases)."
    )


async def validate_yaml(request: Request) -> Response:
    """The check of a card that the clients ask for before an upload: `ModelCard.push_to_hub` asks without its token."""
    content = (await _json(request, of(request))).get("content")
    if not isinstance(content, str):
        raise Refusal(400, "The content of the card is missing.", reason="BAD_CARD")
    try:
        await run_in_threadpool(metadata.front_matter, content.encode("utf-8", "replace"))
    except metadata.FrontMatterError as error:
        problem = {"message": f"The front matter of README.md is not usable: {error}."}
        return JSONResponse({"errors": [problem], "warnings": []}, 400)
    return JSONResponse({"errors": [], "warnings": []})


async def preupload(request: Request) -> Response:
    """How each file is to be sent: inside the commit, by LFS, or not at all; what is refused is refused now."""
    server, name = of(request), parameter(request, "repo")
    server.gate.writer(request, name)
    _only_main(request, name)
    files = (await _json(request, server)).get("files")
    if not isinstance(files, list) or not all(isinstance(each, dict) for each in files):
        raise Refusal(400, "The list of files is missing.", reason="BAD_REQUEST")

    def work() -> Response:
        head = server.repositories.head(name)
        answers = [_upload_mode(server, head, each) for each in files]
        body = {"commitOid": head.sha, "files": answers}
        return JSONResponse(body, headers=_preupload_warnings(server, answers))

    return await run_in_threadpool(work)


def _upload_mode(server: Server, head: Commit, file: dict[str, Any]) -> dict[str, Any]:
    path, size, sample = file.get("path"), file.get("size"), file.get("sample", "")
    if not isinstance(path, str) or not isinstance(size, int) or not isinstance(sample, str):
        raise Refusal(400, "A file of the list lacks its path or its size.", reason="BAD_REQUEST")
    if _left_out(path):
        return {"path": path, "uploadMode": "regular", "shouldIgnore": True}
    check_path(path)
    try:
        check_prefix(path, base64.b64decode(sample)[:9])
    except binascii.Error as error:
        raise Refusal(400, f"The sample of {path} is not base64.", reason="BAD_REQUEST") from error
    sizes = server.settings.sizes
    if size > sizes.large_bytes:
        raise Rejected(f"{path} has {size} bytes, over the limit of {sizes.large_bytes}.", reason="TOO_LARGE")
    large = size > sizes.regular_bytes
    answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    entry = head.tree.get(path)
    if entry is not None and entry[1] == size:
        # The clients skip a file whose id is the same: the sha256 of a large one, the git id of another.
        digest = entry[0]
        answer["oid"] = (
            digest.removeprefix("sha256:")
            if large
            else server.git_ids.get_or(digest, lambda: _git_id(server.repositories.log.blob(digest), size))
        )
    return answer


def _git_id(path: Path, size: int) -> str:
    hasher = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            hasher.update(piece)
    return hasher.hexdigest()


def _left_out(path: str) -> bool:
    """What a push leaves out, too: the state of trainers, and hidden files such as .gitattributes."""
    return is_trainer_state(PurePosixPath(path).name) or any(
        part.startswith(".") and part.strip(".") for part in path.split("/")
    )


def _preupload_warnings(server: Server, answers: list[dict[str, Any]]) -> dict[str, str] | None:
    ignored = [answer["path"] for answer in answers if answer["shouldIgnore"]]
    if ignored:
        shown = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        return warning(f"left-out-{shown[:60]}", f"left out, no part of an adapter: {shown}")
    large = [answer["path"] for answer in answers if answer["uploadMode"] == "lfs"]
    if large:
        limit = server.settings.sizes.regular_bytes
        text = f"{large[0]} is over {limit} bytes and goes by Git LFS: set HF_HUB_DISABLE_XET=1 if the upload fails"
        return warning(f"lfs-{large[0][:60]}", text)
    return None


async def commit(request: Request) -> Response:
    """`create_commit`: the operations of a streamed body, on the head, all or none."""
    server, name = of(request), parameter(request, "repo")
    caller = server.gate.writer(request, name)
    _only_main(request, name)
    repositories, sizes = server.repositories, server.settings.sizes
    await run_in_threadpool(repositories.head, name)  # 404 before the body is taken in
    limit = int(sizes.commit_bytes * BASE64_GROWTH) + sizes.files * sizes.line_bytes
    with repositories.log.staging() as staging:
        parser = _parser(server, staging)
        try:
            async for piece in chunks(request, limit, sizes.idle_seconds):
                await run_in_threadpool(parser.feed, piece)
            header, operations = parser.finish()
        finally:
            parser.abandon()
        incoming = Incoming(
            name, caller.name, header, operations, staging, lambda digest: may_use(server, caller, name, digest)
        )
        made = await to_thread.run_sync(server.committer.commit, incoming, limiter=server.commits)
    return JSONResponse(
        {"success": True, "commitOid": made.sha, "commitUrl": address(request, f"{name}/commit/{made.sha}")}
    )


def _parser(server: Server, staging: Staging) -> CommitParser:
    sizes = server.settings.sizes
    together = Allowance(sizes.commit_bytes, sizes.commit_bytes)
    return CommitParser(lambda: FileSink(staging, Allowance(sizes.regular_bytes, sizes.regular_bytes), together), sizes)


def may_use(server: Server, caller: Caller, name: str, digest: str) -> bool:
    """Whether the caller may refer to stored bytes by their digest alone: those that it uploaded, or may read."""
    if caller.only is None or server.uploads.get((name, digest)):
        return True
    return server.repositories.log.mentions(name, digest)


def _only_main(request: Request, name: str) -> None:
    if "/" not in name:
        raise Refusal(
            400,
            f"{name[:96]!r} can be read, but not committed to: the Hub's clients commit to TEAM/NAME only.",
            reason="BAD_NAME",
        )
    revision = parameter(request, "revision").removeprefix("refs/heads/")
    if flag(request, "create_pr") or revision.startswith("refs/pr/"):
        raise not_implemented("a pull request is", "Commit to main.")
    if revision != MAIN:
        raise Refusal(
            400, f"Commits go to main, not to {revision[:100]!r}: there is no other branch.", reason="NOT_MAIN"
        )


async def _json(request: Request, server: Server) -> dict[str, Any]:
    sizes = server.settings.sizes
    return await read_json(request, sizes.document_bytes, sizes.idle_seconds)
