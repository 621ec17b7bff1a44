"""grpcio alone before the same engine: what a call through it costs when nothing of our services is in between.

A method without messages: bytes in, bytes out. Its handler submits one request that was prepared long before, and
answers when that is over. What it takes above the same request in the process is the least that any asyncio server on
grpcio can take here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio

METHOD = "/bare.Bare/Once"
REQUEST = bytes(600)  # about what a request of the comparison takes
ANSWER = bytes(300)


async def serve_bare(submit: Callable[[Callable[[object], None]], None]) -> tuple[grpc.aio.Server, int]:
    """A server on a free port of this machine. `submit` begins the request and has its argument told the result."""

    async def once(_request: bytes, _context: object) -> bytes:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[object] = loop.create_future()
        submit(lambda result: loop.call_soon_threadsafe(over.set_result, result) and None)
        result = await over
        if isinstance(result, BaseException):
            raise result
        return ANSWER

    service, _, method = METHOD.lstrip("/").partition("/")
    server = grpc.aio.server()
    handlers = {method: grpc.unary_unary_rpc_method_handler(once)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def bare_call(channel: grpc.Channel) -> Callable[[], bytes]:
    """What calls it."""
    call: Callable[[bytes], bytes] = channel.unary_unary(METHOD)
    return lambda: call(REQUEST)
