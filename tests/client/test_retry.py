"""Retries: on UNAVAILABLE only, with backoff, within the deadline, and never after a stream has yielded."""

# ruff: noqa: N802 - gRPC names the methods

from __future__ import annotations

import concurrent.futures
import math
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest

from adapterbay.client import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    ResourceExhaustedError,
    RetryPolicy,
    ServerError,
    UnavailableError,
)
from adapterbay.client.retry import Deadline
from adapterbay.v1 import inference_pb2 as pb
from adapterbay.v1 import inference_pb2_grpc

QUICK = RetryPolicy(max_attempts=4, initial_backoff_seconds=0.01, max_backoff_seconds=0.02)


@dataclass
class Script(inference_pb2_grpc.InferenceServiceServicer):
    """A gRPC service that fails as told a number of times, then answers: no real server fails on demand."""

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    failures: int = 0
    after_pieces: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def _maybe_fail(self, method: str, context: grpc.ServicerContext) -> None:
        self.calls[method] += 1
        if self.calls[method] <= self.failures:
            context.abort(self.code, "as told")

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        self._maybe_fail("Generate", context)
        return pb.GenerateResponse(generation=pb.Generation(text="done"))

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        for _ in range(self.after_pieces):
            yield pb.GenerateStreamResponse(text="piece")
        self._maybe_fail("GenerateStream", context)
        yield pb.GenerateStreamResponse(text="last", finish_reason=pb.FINISH_REASON_END)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


async def test_unavailable_is_tried_again(script: Script, address: str) -> None:
    script.failures = 3
    with Client(address, retry=QUICK) as client:
        assert client.generate("a", base=True).text == "done"
        assert script.calls["Generate"] == 4
        assert [piece.text for piece in client.generate_stream("a", base=True)] == ["last"]
        assert script.calls["GenerateStream"] == 4
    script.calls.clear()
    async with AsyncClient(address, retry=QUICK) as client_:
        assert (await client_.generate("a", base=True)).text == "done"
        assert [piece.text async for piece in client_.generate_stream("a", base=True)] == ["last"]
    assert script.calls == {"Generate": 4, "GenerateStream": 4}


async def test_it_gives_up_after_max_attempts(script: Script, address: str) -> None:
    script.failures = 100
    with Client(address, retry=QUICK) as client, pytest.raises(UnavailableError):
        client.generate("a", base=True)
    assert script.calls["Generate"] == 4
    async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as once:
        with pytest.raises(UnavailableError):
            await once.generate("a", base=True)
    assert script.calls["Generate"] == 5


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code not in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}]
)
async def test_nothing_else_is_tried_again(script: Script, address: str, code: grpc.StatusCode) -> None:
    script.code, script.failures = code, 1
    with Client(address, retry=QUICK) as client:
        with pytest.raises(ServerError) as caught:
            client.generate("a", base=True)
        assert caught.value.code is code
        with pytest.raises(ServerError):
            list(client.generate_stream("a", base=True))
    assert script.calls == {"Generate": 1, "GenerateStream": 1}


async def test_a_stream_that_yielded_is_never_tried_again(script: Script, address: str) -> None:
    script.failures, script.after_pieces = 1, 2
    with Client(address, retry=QUICK) as client:
        stream = client.generate_stream("a", base=True)
        assert [next(stream).text, next(stream).text] == ["piece", "piece"]
        with pytest.raises(UnavailableError):
            next(stream)
    assert script.calls["GenerateStream"] == 1
    script.calls.clear()
    async with AsyncClient(address, retry=QUICK) as client_:
        pieces = client_.generate_stream("a", base=True)
        await anext(pieces)
        await anext(pieces)
        with pytest.raises(UnavailableError):
            await anext(pieces)
    assert script.calls["GenerateStream"] == 1


def test_retries_stay_within_the_deadline(script: Script, address: str) -> None:
    script.failures = 10_000
    patient = RetryPolicy(max_attempts=10_000, initial_backoff_seconds=0.2, max_backoff_seconds=0.2)
    started = time.monotonic()
    with Client(address, retry=patient) as client, pytest.raises((UnavailableError, DeadlineExceededError)):
        client.generate("a", base=True, timeout=0.6)
    assert time.monotonic() - started < 30  # the waits alone would take half an hour
    assert script.calls["Generate"] > 1


def test_a_server_that_starts_late_is_found(script: Script) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patient = RetryPolicy(max_attempts=1_000, initial_backoff_seconds=0.1, max_backoff_seconds=0.2)
    with Client(f"127.0.0.1:{port}", retry=patient) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.generate, "a", base=True, timeout=30)
        time.sleep(0.5)
        assert not answer.done()
        late = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(script, late)
        assert late.add_insecure_port(f"127.0.0.1:{port}") == port
        late.start()
        assert answer.result(20).text == "done"
        late.stop(None)


def test_waits_grow_with_full_jitter() -> None:
    policy = RetryPolicy(max_attempts=50, initial_backoff_seconds=0.1, max_backoff_seconds=0.5, multiplier=2)
    error = UnavailableError(grpc.StatusCode.UNAVAILABLE, "", "", {})
    for attempt, ceiling in [(1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5), (30, 0.5)]:
        waits = [policy.wait_seconds(error, attempt, None) for _ in range(300)]
        numbers = [wait for wait in waits if wait is not None]
        assert len(numbers) == 300
        assert max(numbers) <= ceiling
        assert max(numbers) > 0.8 * ceiling
        assert min(numbers) < 0.2 * ceiling
    assert policy.wait_seconds(error, 50, None) is None
    assert policy.wait_seconds(error, 1, 0.0) is None
    full = ResourceExhaustedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "", {}, 0.5)
    assert policy.wait_seconds(full, 1, None) is None


def test_policies_and_deadlines_that_make_no_sense() -> None:
    for settings in ({"max_attempts": 0}, {"multiplier": 0.5}, {"initial_backoff_seconds": -1}):
        with pytest.raises(ValueError):
            RetryPolicy(**settings)  # type: ignore[arg-type]
    assert Deadline(None, None).remaining() is None
    assert Deadline(math.inf, 5).remaining() is None
    remaining = Deadline(None, 5).remaining()
    assert remaining is not None
    assert 4 < remaining <= 5
