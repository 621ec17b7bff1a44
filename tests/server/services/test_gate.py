"""What a handler does when its caller has left: it stays until gRPC cancels it, because gRPC logs an error otherwise.

The context is a stand-in: real calls meet the moment between a failed message and the cancellation by chance only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import pytest

from adapterbay.registry.errors import DeadlineExceeded
from adapterbay.server.services import gate as gates
from adapterbay.server.services.gate import Gate, GatedServices, Phase

METHOD = "/adapterbay.v1.InferenceService/Generate"


class Gone:
    """A context whose caller has left: nothing can be sent."""

    async def write(self, _message: Any) -> None:
        raise RuntimeError("batch failed")

    async def abort(self, *_status: Any) -> None:
        raise RuntimeError("batch failed")


class Details(grpc.HandlerCallDetails):
    """Of a call of ours."""

    method = METHOD
    invocation_metadata = ()


async def late(_request: Any, _context: Any) -> Any:
    raise DeadlineExceeded("The call's deadline passed.")


async def answers(_request: Any, _context: Any) -> AsyncGenerator[Any, None]:
    yield "one"


async def call(kind: str, gate: Gate) -> asyncio.Task[Any]:
    """A handler of ours under way, whose messages cannot be sent."""
    handler = (
        grpc.unary_unary_rpc_method_handler(late, request_deserializer=bytes)
        if kind == "unary"
        else grpc.unary_stream_rpc_method_handler(answers, request_deserializer=bytes)
    )

    gate.phase = Phase.SERVING
    services = GatedServices(gate)
    services.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("adapterbay.v1.InferenceService", {"Generate": handler})]
    )
    wrapped = services.service(Details())
    assert wrapped is not None
    answer = wrapped.unary_unary or wrapped.unary_stream
    assert answer is not None
    return asyncio.ensure_future(answer(b"", Gone()))


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_handler_whose_caller_left_ends_by_cancellation(kind: str) -> None:
    gate = Gate()
    task = await call(kind, gate)
    done, _ = await asyncio.wait([task], timeout=0.1)
    assert not done
    assert gate.under_way == 0, "a drain does not wait for it"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_message_that_nobody_could_be_sent_is_no_secret(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is still there, so the message itself was wrong: gRPC is told, instead of a stream that just ends."""
    monkeypatch.setattr(gates, "GONE_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match="batch failed"):
        await (await call(kind, Gate()))
