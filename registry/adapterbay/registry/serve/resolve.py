"""The bytes of files: HEAD and GET, ranges, ETags. An altered blob is never sent."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from adapterbay.registry.errors import Corrupted
from adapterbay.registry.serve.problems import COMMIT_HEADER
from adapterbay.registry.serve.server import Server, of, parameter

_TYPES: Final = {".json": "application/json", ".md": "text/plain; charset=utf-8", ".txt": "text/plain; charset=utf-8"}


class BlobResponse(FileResponse):
    """A file of the store, in larger pieces."""

    chunk_size = 1024 * 1024


def resolve(request: Request) -> Response:
    """A file at a revision."""
    server, name, path = of(request), parameter(request, "repo"), parameter(request, "path")
    server.gate.reader(request, name)
    commit = server.repositories.find(name, parameter(request, "revision"))
    digest, size = server.repositories.file(commit, path)
    etag = f'"{digest.removeprefix("sha256:")}"'
    headers = {
        "ETag": etag,
        COMMIT_HEADER: commit.sha,
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if etag in [each.strip() for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    blob, status = _checked(server, digest, size, path, read=request.method == "GET")
    kind = _TYPES.get(PurePosixPath(path).suffix.lower(), "application/octet-stream")
    return BlobResponse(blob, headers=headers, media_type=kind, filename=PurePosixPath(path).name, stat_result=status)


def _checked(server: Server, digest: str, size: int, path: str, *, read: bool) -> tuple[Path, os.stat_result]:
    """The blob, read whole the first time that this very file is sent. Raises Corrupted."""
    blob = server.repositories.log.blob(digest)
    try:
        status = blob.stat()
    except FileNotFoundError as error:
        raise Corrupted(f"{path} is lost in the registry ({digest}): restore it from a copy.") from error
    seen = (status.st_ino, status.st_mtime_ns, status.st_size)
    if status.st_size != size or (read and server.checked.get(digest) != seen):
        server.repositories.log.check_blob(digest, size, path)
        server.checked.put(digest, seen)
    return blob, status
