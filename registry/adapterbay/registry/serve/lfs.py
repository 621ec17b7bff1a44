"""Large files by Git LFS: the batch API, the basic transfer, and verify.

https://github.com/git-lfs/git-lfs/blob/main/docs/api. The clients send the bytes without their token, so the address
that a batch gives them holds a ticket for that one file.
"""

from __future__ import annotations

import os
import re
from typing import Any, Final
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterbay.registry.admission import check_prefix
from adapterbay.registry.errors import Rejected
from adapterbay.registry.serve.auth import Caller
from adapterbay.registry.serve.body import chunks, read_json
from adapterbay.registry.serve.problems import Refusal, not_implemented
from adapterbay.registry.serve.server import Server, address, of, parameter
from adapterbay.registry.serve.uploads import Allowance, FileSink
from adapterbay.registry.serve.writing import may_use

MEDIA_TYPE: Final = "application/vnd.git-lfs+json"
_OID = re.compile(r"[0-9a-f]{64}")


async def batch(request: Request) -> Response:
    """What to do for each object: nothing if its bytes are here, else where to put them."""
    server, name = of(request), parameter(request, "repo")
    caller = server.gate.writer(request, name)
    sizes = server.settings.sizes
    document = await read_json(request, sizes.document_bytes, sizes.idle_seconds)
    if document.get("operation") != "upload":
        raise not_implemented("downloading by Git LFS is", "Files are at /NAME/resolve/REVISION/PATH.")
    objects = document.get("objects")
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise Refusal(400, "The list of objects is missing.", reason="BAD_REQUEST")

    def work() -> list[dict[str, Any]]:
        server.repositories.head(name)
        return [_action(request, server, caller, name, each) for each in objects]

    body = {"transfer": "basic", "objects": await run_in_threadpool(work), "hash_algo": "sha256"}
    return JSONResponse(body, media_type=MEDIA_TYPE)


def _action(request: Request, server: Server, caller: Caller, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
    oid, size = _object(wanted)
    answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    limit = server.settings.sizes.large_bytes
    if size > limit:
        return answer | {"error": {"code": 422, "message": f"{size} bytes are over the limit of {limit}."}}
    if may_use(server, caller, name, f"sha256:{oid}") and _refresh(server, oid, size):
        return answer
    place = f"{name}.git/info/lfs/objects"
    ticket = server.gate.ticket(caller, _subject(name, oid, size))
    upload = {"href": f"{address(request, f'{place}/{oid}')}?{urlencode({'size': size, 'ticket': ticket})}"}
    return answer | {"actions": {"upload": upload, "verify": {"href": address(request, f"{place}/verify")}}}


def _refresh(server: Server, oid: str, size: int) -> bool:
    """Whether the bytes are here; gc's grace period begins anew if no commit has them yet."""
    path = server.repositories.log.blob(f"sha256:{oid}")
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


async def upload(request: Request) -> Response:
    """The bytes of one object. Kept, durably, if they are what the ticket says; else nothing is kept."""
    server, name, oid = of(request), parameter(request, "repo"), parameter(request, "oid")
    size_text = request.query_params.get("size", "")
    if _OID.fullmatch(oid) is None or not size_text.isdigit():
        raise Refusal(400, "The address of this upload is not valid: ask for it again.", reason="BAD_REQUEST")
    size = int(size_text)
    caller = server.gate.holder(request.query_params.get("ticket", ""), _subject(name, oid, size))
    if caller.scope != "write" or not caller.sees(name) or size > server.settings.sizes.large_bytes:
        raise Refusal(403, f"{caller.name} may not upload this to {name}.")
    log = server.repositories.log
    with log.staging() as staging:
        sink = FileSink(staging, Allowance(size, size))
        try:
            async for piece in chunks(request, size, server.settings.sizes.idle_seconds):
                await run_in_threadpool(sink.write, piece)
        finally:
            sink.abandon()
        content = sink.close()
        if content.digest != f"sha256:{oid}":
            raise Rejected(
                f"The {content.size} bytes that came have the sha256 {content.digest.removeprefix('sha256:')}, not "
                f"{oid}: send the file again.",
                reason="DIGEST_MISMATCH",
            )
        check_prefix("The file", content.prefix[:9])

        def keep() -> None:
            log.keep([staging.adopt(content.path, content.digest)])

        await run_in_threadpool(keep)
    server.uploads.put((name, content.digest), True)
    return JSONResponse({})


async def verify(request: Request) -> Response:
    """Whether an uploaded object is here."""
    server, name = of(request), parameter(request, "repo")
    caller = server.gate.writer(request, name)
    sizes = server.settings.sizes
    oid, size = _object(await read_json(request, sizes.document_bytes, sizes.idle_seconds))

    def there() -> bool:
        return may_use(server, caller, name, f"sha256:{oid}") and _refresh(server, oid, size)

    if not await run_in_threadpool(there):
        raise Refusal(404, f"The object {oid} of {size} bytes did not come: upload it again.", code="EntryNotFound")
    return JSONResponse({}, media_type=MEDIA_TYPE)


def _object(wanted: dict[str, Any]) -> tuple[str, int]:
    oid, size = wanted.get("oid"), wanted.get("size")
    if not isinstance(oid, str) or _OID.fullmatch(oid) is None or not isinstance(size, int) or size < 0:
        raise Refusal(400, "An object is named by its sha256 (64 hex digits) and its size.", reason="BAD_REQUEST")
    return oid, size


def _subject(name: str, oid: str, size: int) -> str:
    return f"{name}\n{oid}\n{size}"
