"""Bodies of requests: bounded, and read to their end before an error is answered, so that the client sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final
from urllib.parse import parse_qs

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.serve.problems import Refusal

BATCH_BYTES: Final = 1024 * 1024
DRAIN_SECONDS: Final = 60.0


class ReadToEnd:
    """ASGI middleware: reads what is left of a body, up to `limit` bytes, before the answer begins.

    A client sends its whole body before it looks at the answer. Without this it would see a broken connection in place
    of the reason.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A body that announces more than that is never read to its end.
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        more = not declared.isdigit() or int(declared) <= self._limit

        async def reading() -> Message:
            nonlocal more
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and more:
                left = self._limit
                with anyio.move_on_after(DRAIN_SECONDS):
                    while more and left > 0:
                        left -= len((await reading()).get("body", b""))
            await send(message)

        await self._app(scope, reading, sending)


async def chunks(request: Request, limit: int, idle_seconds: float) -> AsyncIterator[bytes]:
    """The body in pieces of about a MiB. Raises Refusal 413 over `limit` bytes, or 408 after a pause."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    received = 0
    pending: list[bytes] = []
    waiting = 0
    stream = aiter(request.stream())
    while True:
        try:
            with anyio.fail_after(idle_seconds):
                piece = await anext(stream, None)
        except TimeoutError:
            raise Refusal(408, f"Nothing came for {idle_seconds:.0f} seconds: send it again.") from None
        except ClientDisconnect:
            raise Refusal(400, "The connection ended before the body did.", reason="DISCONNECTED") from None
        if piece is None:
            break
        received += len(piece)
        if received > limit:
            raise _too_large(limit)
        pending.append(piece)
        waiting += len(piece)
        if waiting >= BATCH_BYTES:
            yield b"".join(pending)
            pending, waiting = [], 0
    if pending:
        yield b"".join(pending)


async def read_json(request: Request, limit: int, idle_seconds: float) -> dict[str, Any]:
    """A JSON object. An empty body is an empty object. Raises Refusal, or Rejected with reason BAD_JSON."""
    data = b"".join([piece async for piece in chunks(request, limit, idle_seconds)])
    return parse_json_object(data, "The request's body") if data else {}


async def read_form(request: Request, limit: int, idle_seconds: float) -> dict[str, list[str]]:
    """An urlencoded form, as the clients send lists of paths; or JSON with the same fields."""
    if "json" in request.headers.get("content-type", ""):
        document = await read_json(request, limit, idle_seconds)
        return {
            key: [str(item) for item in (value if isinstance(value, list) else [value])]
            for key, value in document.items()
        }
    data = b"".join([piece async for piece in chunks(request, limit, idle_seconds)])
    try:
        return parse_qs(data.decode("ascii"), max_num_fields=10_000, strict_parsing=bool(data))
    except ValueError as error:
        raise Refusal(400, f"The form is not usable: {error}.", reason="BAD_FORM") from error


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"The body is over the limit of {limit} bytes.", reason="TOO_LARGE")
