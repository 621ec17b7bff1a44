"""The ASGI app: routes, and what happens around every request."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterbay.registry.errors import AdapterbayError
from adapterbay.registry.serve import absent, lfs, reading, resolve, writing
from adapterbay.registry.serve.body import ReadToEnd
from adapterbay.registry.serve.problems import Refusal, answer
from adapterbay.registry.serve.server import Server, address
from adapterbay.registry.serve.settings import ServeSettings

_log = logging.getLogger("adapterbay.registry.serve")
_access = logging.getLogger("adapterbay.registry.serve.access")


class _Repository(Convertor[str]):
    """NAME or TEAM/NAME, still quoted."""

    regex = "[^/]+(?:/[^/]+)?"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("repo", _Repository())

_MODEL: Final = "/api/models/{repo:repo}"
_LFS: Final = "/{repo:repo}.git/info/lfs/objects"


def make_app(settings: ServeSettings) -> Starlette:
    """The server of one registry. Raises as `Registry.open` does, and `locate` for a base that is not there."""
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.close()

    app = Starlette(
        routes=_routes(),
        lifespan=lifespan,
        middleware=[
            Middleware(AccessLog),
            Middleware(QuotedPath),
            Middleware(ReadToEnd, limit=2 * settings.sizes.commit_bytes),
        ],
        exception_handlers={AdapterbayError: _failed, Exception: _broken, 404: _no_route, 405: _no_route},
    )
    app.state.server = server
    return app


def _routes() -> list[Route]:
    return [
        Route("/", front, methods=["GET"]),
        Route("/healthz", healthy, methods=["GET"]),
        Route("/api/whoami-v2", reading.whoami),
        Route("/api/validate-yaml", writing.validate_yaml, methods=["POST"]),
        Route("/api/models", reading.models),
        Route("/api/repos/create", writing.create, methods=["POST"]),
        Route("/api/repos/delete", writing.delete, methods=["DELETE"]),
        Route(f"{_MODEL}/auth-check", reading.auth_check),
        Route(f"{_MODEL}/auth-check/write", reading.auth_check),
        Route(f"{_MODEL}/revision/{{revision}}", reading.model),
        Route(f"{_MODEL}/tree/{{revision}}", reading.tree),
        Route(f"{_MODEL}/tree/{{revision}}/{{path:path}}", reading.tree),
        Route(f"{_MODEL}/paths-info/{{revision}}", reading.paths_info, methods=["POST"]),
        Route(f"{_MODEL}/refs", reading.refs),
        Route(f"{_MODEL}/commits/{{revision}}", reading.commits),
        Route(f"{_MODEL}/tag/{{revision}}", writing.add_tag, methods=["POST"]),
        Route(f"{_MODEL}/tag/{{tag}}", writing.remove_tag, methods=["DELETE"]),
        Route(f"{_MODEL}/branch/{{branch}}", writing.branch, methods=["POST", "DELETE"]),
        Route(f"{_MODEL}/preupload/{{revision}}", writing.preupload, methods=["POST"]),
        Route(f"{_MODEL}/commit/{{revision}}", writing.commit, methods=["POST"]),
        Route(f"{_MODEL}/xet-read-token/{{rest:path}}", absent.xet),
        Route(f"{_MODEL}/xet-write-token/{{rest:path}}", absent.xet),
        Route(_MODEL, reading.model),
        *(_everything(f"/{kind}/{{rest:path}}", absent.anything) for kind in ("api", "datasets", "spaces")),
        Route(f"{_LFS}/batch", lfs.batch, methods=["POST"]),
        Route(f"{_LFS}/verify", lfs.verify, methods=["POST"]),
        Route(f"{_LFS}/{{oid}}", lfs.upload, methods=["PUT"]),
        _everything("/{repo:repo}.git/{rest:path}", absent.git),
        Route("/{repo:repo}/resolve/{revision}/{path:path}", resolve.resolve),
        Route("/{repo:repo}/commit/{revision}", reading.commit_page),
        Route("/{repo:repo}", reading.missing),
        _everything("/{rest:path}", absent.anything),
    ]


def _everything(path: str, endpoint: Callable[[Request], Any]) -> Route:
    return Route(path, endpoint, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])


def front(request: Request) -> Response:
    """For people who open the address."""
    return PlainTextResponse(
        f"A registry of adapters by adapterbay, which speaks the Hugging Face Hub's protocol.\n\n"
        f"    export HF_ENDPOINT={address(request)}\n    export HF_TOKEN=...\n    hf download TEAM/NAME\n"
    )


def healthy(_: Request) -> Response:
    """Whether the server runs."""
    return JSONResponse({"status": "ok"})


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterbayError)
    response = answer(error)
    if response.status_code >= 500 and response.status_code != 501:
        _log.error("%s", error.message)
    return response


async def _broken(_: Request, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    return answer(Refusal(500, "The registry made a mistake; its log says which.", reason="INTERNAL"))


async def _no_route(request: Request, _: Exception) -> Response:
    return answer(Refusal(404, f"There is nothing at {request.method} {request.url.path[:200]}.", reason="NO_ADDRESS"))


class QuotedPath:
    """Routes are matched on the address as it was sent, since a quoted '/' is a part of a revision or a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("ascii", "replace")
        await self._app(scope, receive, send)


class AccessLog:
    """One line per request: who, what, how it went. Queries are left out, since they hold tickets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, sent = 0, 0

        async def counting(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counting)
        finally:
            client = scope.get("client") or ("-",)
            fields = {
                "method": scope["method"],
                "path": scope["raw_path"].decode("ascii", "replace"),
                "status": status,
                "bytes": sent,
                "milliseconds": round(1000 * (time.perf_counter() - began), 1),
                "client": client[0],
                "caller": scope.get("adapterbay.caller", "-"),
            }
            _access.info(" ".join(f"{key}={value}" for key, value in fields.items()), extra={"request": fields})
