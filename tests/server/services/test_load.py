"""Deadlines, cancellation and a full queue: rows are freed, nobody hangs, memory comes back."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Iterator

import grpc
import grpc.aio
import psutil
import pytest
from engine_tools import held
from serving_tools import Failure, Served
from zoo import Zoo

from adapterbay.v1 import inference_pb2 as pb
from adapterbay.v1 import inference_pb2_grpc

Stub = inference_pb2_grpc.InferenceServiceStub
ENDLESS = pb.Sampling(max_tokens=500, ignore_end=True)
MEBIBYTE = 1 << 20


def stream(adapter: str = "tales", sampling: pb.Sampling = ENDLESS) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(adapter=adapter, prompt="go", sampling=sampling)


def wait_until(condition: object, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_cancelled_stream_frees_its_row(inference: Stub, served: Served) -> None:
    call = inference.GenerateStream(stream())
    next(call)
    assert served.engine.stats().running == 1
    steps = served.engine.stats().steps
    call.cancel()
    served.idle()
    assert served.engine.stats().steps - steps < 400, "the row ran on long after its caller had gone"


def test_a_cancelled_unary_call_frees_its_row(inference: Stub, served: Served) -> None:
    future = inference.Generate.future(pb.GenerateRequest(adapter="tales", prompt="go", sampling=ENDLESS))
    wait_until(lambda: served.engine.stats().running == 1)
    future.cancel()
    served.idle(5)


@pytest.mark.parametrize("kind", ["classify", "compare"])
def test_a_cancelled_windowed_call_frees_all_its_rows(inference: Stub, served: Served, kind: str) -> None:
    if kind == "classify":
        request = pb.ClassifyRequest(adapter="sentiment", texts=["z" * 400] * 500)
        call = inference.Classify.future(request)
        wait_until(lambda: served.engine.stats().running > 0)
    else:
        call = inference.Compare(
            pb.CompareRequest(
                arms=[pb.Arm(adapter="tales"), pb.Arm(base=True)],
                inputs=[pb.CompareInput(text=f"input {i}") for i in range(200)],
                generate=pb.GenerateTask(sampling=pb.Sampling(max_tokens=20, ignore_end=True)),
            )
        )
        next(iter(call))
    call.cancel()
    served.idle(5)


def test_a_deadline_frees_its_row(inference: Stub, served: Served) -> None:
    with held(served.engine), pytest.raises(grpc.RpcError) as caught:
        inference.Generate(pb.GenerateRequest(adapter="tales", prompt="go", sampling=ENDLESS), timeout=0.15)
    assert Failure(caught.value).code is grpc.StatusCode.DEADLINE_EXCEEDED
    steps = served.engine.stats().steps
    served.idle()
    assert served.engine.stats().steps - steps < 5, "the row ran on after its deadline"


@pytest.fixture(scope="module")
def narrow(zoo: Zoo) -> Iterator[Served]:
    """A server that takes four rows: two run, two wait."""
    with Served(zoo, max_rows=2, max_queue=2) as served:
        yield served


def test_a_full_queue_answers_at_once_with_a_delay(narrow: Served) -> None:
    with grpc.insecure_channel(narrow.address) as channel:
        stub = Stub(channel)
        with held(narrow.engine):  # the answers come while it stands still
            calls = [stub.GenerateStream(stream()) for _ in range(4)]
            wait_until(lambda: narrow.engine.stats().running + narrow.engine.stats().waiting == 4)
            for call in (
                lambda: stub.Generate(pb.GenerateRequest(base=True, prompt="a"), timeout=30),
                lambda: stub.Classify(pb.ClassifyRequest(adapter="sentiment", texts=["a", "b"]), timeout=30),
                lambda: next(stub.GenerateStream(stream(), timeout=30)),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                found = Failure(caught.value)
                assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
                assert found.retry_after is not None
                assert 0 < found.retry_after < 60
            for call in calls:
                call.cancel()
        narrow.idle()
        assert stub.Generate(pb.GenerateRequest(base=True, prompt="a", sampling=pb.Sampling(max_tokens=1)))


def test_a_windowed_call_waits_for_its_own_rows(narrow: Served) -> None:
    """Others hold all places but one: the call goes on through that one instead of failing."""
    with grpc.insecure_channel(narrow.address) as channel:
        stub = Stub(channel)
        calls = [stub.GenerateStream(stream()) for _ in range(3)]
        wait_until(lambda: narrow.engine.stats().running + narrow.engine.stats().waiting == 3)
        answer = stub.Classify(pb.ClassifyRequest(adapter="sentiment", texts=[f"t{i}" for i in range(5)]))
        assert len(answer.classifications) == 5
        for call in calls:
            call.cancel()
        narrow.idle()


def test_more_arms_than_rows_is_refused(narrow: Served) -> None:
    with grpc.insecure_channel(narrow.address) as channel:
        request = pb.CompareRequest(
            arms=[pb.Arm(base=True)] * 3, inputs=[pb.CompareInput(text="a")], generate=pb.GenerateTask()
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(Stub(channel).Compare(request))
        assert Failure(caught.value).code is grpc.StatusCode.INVALID_ARGUMENT
    narrow.idle()


async def one_of_the_crowd(stub: inference_pb2_grpc.InferenceServiceAsyncStub, luck: random.Random) -> str:
    """One streaming call with a fate of its own; says how it ended."""
    fate = luck.choice(["whole", "cancel", "deadline", "leave"])
    most = luck.randint(1, 40)
    request = stream(
        luck.choice(["tales", "songs"]),
        pb.Sampling(max_tokens=most, ignore_end=True, temperature=1.0, seed=luck.randint(0, 1000)),
    )
    await asyncio.sleep(luck.random() * 2)
    call = stub.GenerateStream(request, timeout=luck.uniform(0.01, 1.5) if fate == "deadline" else 90)
    cancel_after = luck.uniform(0, 1.0)
    if fate == "cancel":
        asyncio.get_running_loop().call_later(cancel_after, call.cancel)
    tokens = 0
    try:
        async for piece in call:
            tokens += len(piece.token_ids)
            if fate == "leave" and tokens > most // 2:
                call.cancel()
                return "left"
            if piece.HasField("provenance"):
                assert tokens == most
                return "whole"
    except asyncio.CancelledError:
        return "cancelled"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "ended"


async def crowd(address: str, size: int, seed: int) -> dict[str, int]:
    luck = random.Random(seed)
    ends: dict[str, int] = {}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = Stub(channel)
        async with asyncio.timeout(120):
            for end in await asyncio.gather(
                *(one_of_the_crowd(stub, random.Random(luck.random())) for _ in range(size))
            ):
                ends[end] = ends.get(end, 0) + 1
    return ends


@pytest.mark.slow
async def test_500_streams_with_random_ends_leave_nothing_behind(zoo: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    """None hangs; rows, cache blocks and memory come back. Memory is compared with a first, equal round: what a round
    takes once (thread stacks, allocator arenas, compiled kernels) is not a leak; what every round takes is."""
    with Served(zoo, max_rows=32, max_queue=1024) as served:
        process = psutil.Process()
        sizes = []
        for seed in (1, 2, 3):
            ends = await crowd(served.address, 500, seed)
            assert sum(ends.values()) == 500
            assert set(ends) <= {"whole", "left", "cancelled", "CANCELLED", "DEADLINE_EXCEEDED"}, ends
            assert ends["whole"] > 50
            assert ends["DEADLINE_EXCEEDED"] > 10
            await asyncio.to_thread(served.idle)
            gc.collect()
            sizes.append(process.memory_info().rss)
        assert served.engine.stats().host_bytes < 8 * MEBIBYTE
        errors = [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}]
        # gRPC's own, for a last status that it could not send because the deadline passed just then.
        assert not [error for error in errors if not error.startswith("ExecuteBatchError raised in core")]
        assert len(errors) < 3
        growth = (sizes[-1] - sizes[0]) / MEBIBYTE
        assert growth < 48, f"memory grew by {growth:.0f} MiB over two rounds of 500 streams"


@pytest.mark.slow
async def test_a_crowd_over_a_full_queue_gets_answers_too(zoo: Zoo) -> None:
    with Served(zoo, max_rows=4, max_queue=16) as served:
        ends = await crowd(served.address, 200, 4)
        assert sum(ends.values()) == 200
        assert set(ends) <= {"whole", "left", "cancelled", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
        await asyncio.to_thread(served.idle)
