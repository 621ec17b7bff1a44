"""Around every call of ours: the gate, the error tree as gRPC status, and streams that are closed for sure."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, NoReturn, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from adapterbay.registry.errors import InvalidArgument, Unavailable
from adapterbay.server.adapters.tally import Counts
from adapterbay.server.status import DETAILS_KEY, code_of, status_of

_OURS = "/adapterbay.v1."
_WITHOUT_END = frozenset({"/adapterbay.v1.AdapterService/WatchAdapters"})
"""Streams that only their caller or a stop ends: a drain does not wait for them."""
GONE_SECONDS = 5.0
"""The longest wait for gRPC to notice that a caller has left; it takes milliseconds."""

_logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
UnaryBehavior = Callable[[Any, Context], Awaitable[Any]]
StreamBehavior = Callable[[Any, Context], AsyncGenerator[Any, None]]
Parser = Callable[[bytes], Any]


class Phase(enum.Enum):
    """Where the server is in its life; the value is the reason given to refused calls."""

    STARTING = "STARTING"
    SERVING = "SERVING"
    DRAINING = "DRAINING"


_REFUSALS = {
    Phase.STARTING: "The server is starting and has not loaded its base yet; try again in a moment.",
    Phase.DRAINING: "The server is stopping and takes no new requests.",
}


class Gate:
    """Admits calls while the server serves, knows how many are under way, and counts those that ended.

    `ended` has the method and the name of the status code; CANCELLED is also a caller that left.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.under_way = 0
        self.ended = Counts()

    @contextlib.contextmanager
    def admitted(self, method: str) -> Iterator[None]:
        """Counts a call. Raises Unavailable outside the serving phase."""
        if self.phase is not Phase.SERVING:
            raise Unavailable(_REFUSALS[self.phase], reason=self.phase.value)
        counted = method not in _WITHOUT_END
        self.under_way += counted
        try:
            yield
        finally:
            self.under_way -= counted

    async def idle(self) -> None:
        """Returns once no call is under way."""
        while self.under_way:
            await asyncio.sleep(0.01)


async def _never(_request: Any, _context: Context) -> Any:
    raise AssertionError("the gate admits nothing outside the serving phase")


def _parsed(parse: Parser, request: bytes) -> Any:
    """The request message. gRPC itself would answer INTERNAL to bytes that are none."""
    try:
        return parse(request)
    except DecodeError as error:
        raise InvalidArgument(f"The request is not a valid message: {error}.", reason="MALFORMED_MESSAGE") from error


class _CallerGone(Exception):
    """A message could not be sent: there is nobody to tell anything any more."""


async def _send(response: Any, context: Context) -> None:
    try:
        await context.write(response)
    except Exception as error:  # gRPC has no public name for it
        raise _CallerGone from error


async def _caller_gone(method: str, unsent: BaseException | None) -> NoReturn:
    """Waits for gRPC to cancel this handler, as it does with those whose caller has left; `unsent` is why it has.

    That may come a moment after a message could not be sent, and a handler that returns in between has gRPC log an
    error for it (10 in 4,500 calls whose deadlines passed, with grpcio 1.85). If it does not come, the caller is there
    and the message was wrong: that is raised.
    """
    _logger.debug("%s: the caller is gone", method)
    await asyncio.sleep(GONE_SECONDS)
    raise unsent or AssertionError("a message could not be sent")


class GatedServices(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Our services, which come after the server has started, with the gate around each of their methods.

    Give it to the server as a handler, and to the generated `add_…_to_server` functions in place of the server. gRPC
    asks it for each call; an interceptor would do, too, and costs each call another coroutine.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._services: list[grpc.GenericRpcHandler[Any, Any]] = []
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """What the generated functions call."""
        self._services.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """The generated functions give the same handlers a second time, as a shortcut that we do not take."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a method, if one of the services has it.

        While the server starts, the services are not there yet; their calls are refused, not unknown.
        """
        method = handler_call_details.method
        if not method.startswith(_OURS):
            return None
        if self._gate.phase is not Phase.SERVING:
            return grpc.unary_unary_rpc_method_handler(self._unary(_never, method, bytes))
        handler = self._wrapped.get(method)
        if handler is None:
            found = (service.service(handler_call_details) for service in self._services)
            bare = next((handler for handler in found if handler is not None), None)
            if bare is None:
                return None
            handler = self._wrapped[method] = self._around_each(bare, method)
        return handler

    def _around_each(self, bare: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
        parse, write = cast(Parser, bare.request_deserializer), bare.response_serializer
        if bare.response_streaming:
            stream = self._stream(cast(StreamBehavior, bare.unary_stream), method, parse)
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=write)
        unary = self._unary(cast(UnaryBehavior, bare.unary_unary), method, parse)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=write)

    def _unary(self, behavior: UnaryBehavior, method: str, parse: Parser) -> Callable[..., Any]:
        async def answer(request: bytes, context: Context) -> Any:
            async with self._around(method, context):
                return await behavior(_parsed(parse, request), context)

        return answer

    def _stream(self, behavior: StreamBehavior, method: str, parse: Parser) -> Callable[..., Any]:
        # Written with context.write and not as a generator: gRPC would cancel a generator only at its yield, and
        # leave its rows to the garbage collector.
        async def answer(request: bytes, context: Context) -> None:
            async with (
                self._around(method, context),
                contextlib.aclosing(behavior(_parsed(parse, request), context)) as responses,
            ):
                async for response in responses:
                    await _send(response, context)

        return answer

    @contextlib.asynccontextmanager
    async def _around(self, method: str, context: Context) -> AsyncIterator[None]:
        name = method.rpartition("/")[2]
        try:
            with self._gate.admitted(method):
                yield
            self._gate.ended.add(name, "OK")
        except asyncio.CancelledError:
            self._gate.ended.add(name, "CANCELLED")
            raise
        except _CallerGone as gone:
            self._gate.ended.add(name, "CANCELLED")
            await _caller_gone(method, gone.__cause__)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is becomes a status; bugs are logged there
            status = status_of(error)
            self._gate.ended.add(name, code_of(error).name)
            _logger.info("%s: %s %s", method, code_of(error).name, status.message)
            try:
                await context.abort(code_of(error), status.message, ((DETAILS_KEY, status.SerializeToString()),))
            except grpc.aio.AbortError:
                raise
            except Exception as unsent:  # noqa: BLE001 - gRPC has no public name for it
                await _caller_gone(method, unsent)
