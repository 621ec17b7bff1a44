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
from adapterbay.server.services.interceptor import CallInterceptor, Gate, Phase

METHOD = "/adapterbay.v1.InferenceService/Generate"


class Gone:
    """A context whose caller has left: nothing can be sent."""

    async def write(self, _message: Any) -> None:
        raise RuntimeError("batch failed")

    async def abort(self, *_status: Any) -> None:
        raise RuntimeError("batch failed")


class Details:
    """Of a call of ours."""

    method = METHOD
    invocation_metadata = ()


async def late(_request: Any, _context: Any) -> Any:
    raise DeadlineExceeded("The call's deadline passed.")


async def answers(_request: Any, _context: Any) -> AsyncGenerator[Any, None]:
    yield "one"


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_handler_whose_caller_left_ends_by_cancellation(kind: str) -> None:
    handler = (
        grpc.unary_unary_rpc_method_handler(late, request_deserializer=bytes)
        if kind == "unary"
        else grpc.unary_stream_rpc_method_handler(answers, request_deserializer=bytes)
    )

    async def found(_details: Any) -> Any:
        return handler

    gate = Gate()
    gate.phase = Phase.SERVING
    wrapped = await CallInterceptor(gate).intercept_service(found, Details())  # type: ignore[arg-type]
    answer = wrapped.unary_unary or wrapped.unary_stream
    assert answer is not None
    task = asyncio.ensure_future(answer(b"", Gone()))
    done, _ = await asyncio.wait([task], timeout=0.1)
    assert not done
    assert gate.under_way == 0, "a drain does not wait for it"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
