"""Both clients over a real server: every call, typed answers, typed errors."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import grpc
import pytest
from engine_tools import held
from serving_tools import Served

from adapterbay.client import (
    AsyncClient,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    FailedPreconditionError,
    Fusion,
    Generation,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    Selection,
    ServerError,
    WeightedAdapter,
)

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_generate_and_its_stream_agree(client: Client, served: Served) -> None:
    options = {"max_tokens": 9, "ignore_end": True, "log_probabilities": 2}
    whole = client.generate("Once", adapter="tales@1", **options)  # type: ignore[arg-type]
    assert isinstance(whole, Generation)
    assert len(whole.token_ids) == 9 == len(whole.log_probabilities)
    assert len(whole.log_probabilities[0].top) == 2
    assert whole.finish_reason == "length"
    assert whole.prompt_tokens == 4
    (use,) = whole.provenance.adapters
    assert (use.reference, use.name, use.version, use.weight) == ("tales@1", "tales", 1, 1.0)
    assert use.digest == served.zoo.registry.resolve("tales").digest
    pieces = list(client.generate_stream("Once", adapter="tales@1", **options))  # type: ignore[arg-type]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert pieces[-1].provenance is not None
    assert pieces[-1].provenance.adapters == whole.provenance.adapters


def test_messages_fusion_and_base(client: Client) -> None:
    chat = client.generate(messages=CHAT, base=True, max_tokens=2)
    assert chat.provenance.adapters == ()
    fused = client.generate("a", fusion={"tales": 0.5, "songs": -1.0}, max_tokens=2)
    assert [(use.name, use.weight) for use in fused.provenance.adapters] == [("tales", 0.5), ("songs", -1.0)]


def test_a_fusion_by_its_text_and_by_its_values(client: Client) -> None:
    text = "ties_svd(tales:0.5[layers.0-1=2]+songs:-1, density=0.25, rank=3)"
    fusion = Fusion(
        (WeightedAdapter("tales", 0.5, {"layers.0-1": 2.0}), WeightedAdapter("songs", -1.0)),
        method="ties_svd",
        density=0.25,
        rank=3,
    )
    assert Fusion.parse(text) == fusion
    answers = [client.generate("a", fusion=chosen, max_tokens=2) for chosen in (text, fusion)]
    assert answers[0].text == answers[1].text
    use = answers[0].provenance.fusion
    assert use is not None
    assert (use.method, use.density, use.majority_sign, use.rank, use.seed) == ("ties_svd", 0.25, "total", 3, None)
    assert answers[0].provenance.adapters[0].layer_weights == {"layers.0-1": 2.0}
    scaled = client.generate("a", fusion="tales:0.5", max_tokens=2).provenance
    assert (scaled.adapters[0].weight, scaled.fusion) == (0.5, None)
    compared = list(client.compare_generate(["tales:0.5+songs:1", "tales", text], ["a"], max_tokens=2))
    assert sorted(len(answer.provenance.adapters) for answer in compared) == [1, 2, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:0.5+b", "'b' has no weight"),
        ("a:x", "'x' in 'a:x' is not a number"),
        ("a:1+a:2", "twice"),
        ("average(a:1+b:1)", "not a method"),
        ("ties(a:1+b:1, depth=3)", "depth=3"),
        ("ties(a:1+b:1, density=much)", "no density"),
        ("ties(a:1+b:1, rank=2, rank=3)", "twice"),
        ("ties(a:1+b:1, majority_sign=most)", "frequency"),
        ("a:1[q_proj]", "q_proj"),
        ("a:1[q_proj=1,q_proj=2]", "twice"),
        ("a:1[q_proj=1", "brackets"),
        ("", "no weight"),
    ],
)
def test_texts_that_are_no_fusion(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Fusion.parse(text)


def test_sampling_with_a_seed_repeats_itself(client: Client) -> None:
    def once() -> str:
        return client.generate(
            "a", base=True, max_tokens=20, temperature=1.0, top_k=50, top_p=0.95, seed=3, stop=["\x00"]
        ).text

    assert once() == once()


def test_classify_embed_compare(client: Client) -> None:
    labelled = client.classify(["good", "bad", "ugly"], adapter="sentiment@champion", truncate=True)
    assert len(labelled) == 3
    assert labelled[0].label in {"no", "yes"}
    assert labelled[0].probability == max(score.probability for score in labelled[0].scores)
    assert labelled.provenance.adapters[0].version == 1
    vectors = client.embed(["good", "bad"], base=True, pooling="last", normalize=True)
    assert len(vectors[0].values) == 64
    assert sum(value**2 for value in vectors[1].values) == pytest.approx(1, abs=1e-5)

    answers = list(client.compare_classify(["sentiment", Selection(adapter="sentiment-b")], ["good", "bad"]))
    assert {(answer.arm_index, answer.input_index) for answer in answers} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(answer.classification is not None and answer.generation is None for answer in answers)
    arms = ["tales", Selection(base=True), Selection(fusion={"tales": 1.0, "songs": 1.0})]
    generated = list(client.compare_generate(arms, ["one", CHAT], max_tokens=3, temperature=1.0, seed=5))
    assert len(generated) == 6
    assert {answer.seed for answer in generated} == {5}
    assert all(answer.generation is not None for answer in generated)


def test_adapters(client: Client) -> None:
    names = [adapter.name for adapter in client.list_adapters(page_size=2)]
    assert names == sorted(names)
    assert {"tales", "songs", "sentiment", "foreign"} <= set(names)
    info = client.get_adapter("sentiment@champion")
    assert (info.name, info.labels, info.aliases) == ("sentiment", ("no", "yes"), ("champion",))
    assert isinstance(info.created_at, datetime)
    assert info.created_at.tzinfo is not None
    assert info.manifest_json is not None
    client.unload_adapter("songs")
    loaded = client.load_adapter("songs")
    assert loaded.load_seconds > 0
    assert loaded.adapter.residency in {"host", "device"}
    assert client.pin_adapter("songs").pinned
    assert not client.pin_adapter("songs", False).pinned
    assert client.unload_adapter("songs").freed_bytes > 0


def test_watch(client: Client, served: Served) -> None:
    registry = served.zoo.registry
    registry.push(served.zoo.folders["tales"], "watched", base=f"folder:{served.zoo.base}")
    with contextlib.closing(client.watch_adapters("watched", snapshot=True, timeout=20)) as changes:
        first = next(changes)
        assert (first.kind, first.adapter.name, first.alias) == ("snapshot", "watched", None)
        registry.set_alias("watched", "live", 1)
        moved = next(changes)
        assert moved.kind == "alias_set"
        assert moved.alias is not None
        assert (moved.alias.name, moved.alias.version, moved.previous_version) == ("live", 1, 0)


def test_typed_errors(client: Client) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.classify(["a"], adapter="sentimnet")
    assert missing.value.code is grpc.StatusCode.NOT_FOUND
    assert missing.value.reason == "NOT_FOUND"
    assert "sentiment" in missing.value.near
    with pytest.raises(InvalidArgumentError) as wrong:
        client.generate("a", base=True, top_p=0.5)
    assert wrong.value.field == "sampling.top_p"
    with pytest.raises(FailedPreconditionError) as foreign:
        client.generate("a", adapter="foreign")
    assert foreign.value.reason == "BASE_MISMATCH"
    assert set(foreign.value.metadata) == {"base_fingerprint", "adapter_base_fingerprint", "adapter_digest"}
    assert str(foreign.value).startswith("foreign@1: The adapter was trained on base folder:")
    with pytest.raises(FailedPreconditionError):
        list(client.compare_classify(["tales", "sentiment"], ["a"]))
    with pytest.raises(InvalidArgumentError):
        list(client.generate_stream("", base=True))
    again = pickle.loads(pickle.dumps(missing.value))  # noqa: S301 - what a process pool does with our own error
    assert (type(again), again.reason, again.near) == (NotFoundError, "NOT_FOUND", missing.value.near)


def test_a_deadline(client: Client, served: Served) -> None:
    with held(served.engine):
        with pytest.raises(DeadlineExceededError):
            client.generate("a", base=True, max_tokens=500, ignore_end=True, timeout=0.1)
        with Client(served.address, timeout=0.1) as hasty, pytest.raises(DeadlineExceededError):
            hasty.generate("a", base=True, max_tokens=500, ignore_end=True)
    served.idle()


def test_a_full_queue_says_when_to_try_again(served: Served) -> None:
    with Served(served.zoo, max_rows=1, max_queue=1) as narrow, Client(narrow.address) as client:
        streams = [client.generate_stream("a", base=True, max_tokens=500, ignore_end=True) for _ in range(2)]
        waiting = threading.Thread(target=lambda: next(streams[1]), daemon=True)
        next(streams[0])
        with held(narrow.engine):
            waiting.start()
            while narrow.engine.stats().waiting < 1:
                time.sleep(0.01)
            with pytest.raises(ResourceExhaustedError) as full:
                client.generate("a", base=True, timeout=30)
        assert full.value.retry_after_seconds is not None
        assert full.value.retry_after_seconds > 0
        streams[0].close()
        waiting.join(20)
        streams[1].close()
        narrow.idle()


def test_closing_a_stream_frees_its_row(client: Client, served: Served) -> None:
    stream = client.generate_stream("a", base=True, max_tokens=500, ignore_end=True)
    next(stream)
    stream.close()
    served.idle(5)


@pytest.mark.parametrize(
    "selection",
    [{}, {"adapter": "a", "base": True}, {"fusion": {"a": 1.0}, "adapter": "b"}, {"base": False}],
    ids=["none", "two", "fusion and adapter", "base false"],
)
def test_exactly_one_selection(client: Client, selection: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        client.generate("a", **selection)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exactly one"):
        Selection(**selection)  # type: ignore[arg-type]


def test_mistakes_that_need_no_server(client: Client) -> None:
    with pytest.raises(ValueError, match="either"):
        client.generate(base=True)
    with pytest.raises(ValueError, match="either"):
        client.generate("a", messages=CHAT, base=True)
    with pytest.raises(TypeError, match="sequence"):
        client.classify("one text", adapter="sentiment")
    with pytest.raises(TypeError, match="sequence"):
        client.generate("a", base=True, stop="x")
    with pytest.raises(ValueError, match="pooling"):
        client.embed(["a"], base=True, pooling="max")
    with pytest.raises(TypeError):
        client.generate("a", base=True, max_token=3)  # type: ignore[call-arg]


def test_many_threads_share_one_client(client: Client, served: Served) -> None:
    def work(index: int) -> tuple[int, ...]:
        return client.generate(f"p{index % 4}", adapter=["tales", "songs"][index % 2], max_tokens=6).token_ids

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(work, range(64)))
    for index in range(4):
        assert len(set(answers[index::4])) == 1
    served.idle()


def test_close_works_in_every_state(served: Served) -> None:
    unused = Client("127.0.0.1:1")
    unused.close()
    unused.close()
    with pytest.raises(ClientClosedError):
        unused.generate("a", base=True)
    with pytest.raises(ClientClosedError):
        next(unused.watch_adapters())
    busy = Client(served.address)
    stream = busy.generate_stream("a", base=True, max_tokens=500, ignore_end=True)
    next(stream)
    busy.close()
    with pytest.raises(ServerError):
        list(stream)
    served.idle(5)


async def test_the_asyncio_client(served: Served) -> None:
    async with AsyncClient(served.address) as client:
        whole = await client.generate("Once", adapter="tales", max_tokens=9, ignore_end=True)
        pieces = [
            piece async for piece in client.generate_stream("Once", adapter="tales", max_tokens=9, ignore_end=True)
        ]
        assert "".join(piece.text for piece in pieces) == whole.text
        labelled = await client.classify(["a", "b"], adapter="sentiment")
        assert len(labelled) == 2
        assert len((await client.embed(["a"], base=True))[0].values) == 64
        compared = [answer async for answer in client.compare_classify(["sentiment", "stars"], ["a", "b"])]
        assert len(compared) == 4
        generated = [a async for a in client.compare_generate(["tales", Selection(base=True)], ["a"], max_tokens=2)]
        assert {answer.arm_index for answer in generated} == {0, 1}
        assert "tales" in [adapter.name async for adapter in client.list_adapters(page_size=3)]
        assert (await client.get_adapter("tales")).manifest_json
        assert (await client.load_adapter("tales")).adapter.name == "tales"
        assert (await client.pin_adapter("tales")).pinned
        assert not (await client.pin_adapter("tales", False)).pinned
        assert (await client.unload_adapter("tales")).adapter.residency == "registry"
        async with contextlib.aclosing(client.watch_adapters("tales", snapshot=True)) as changes:
            assert (await anext(changes)).kind == "snapshot"
        with pytest.raises(NotFoundError):
            await client.generate("a", adapter="no-such-adapter")
        with pytest.raises(InvalidArgumentError):
            _ = [piece async for piece in client.generate_stream("", base=True)]
        with pytest.raises(DeadlineExceededError):
            await client.generate("a", base=True, max_tokens=500, ignore_end=True, timeout=0.1)


async def test_cancelling_a_task_cancels_its_call(served: Served) -> None:
    async with AsyncClient(served.address) as client:
        task = asyncio.create_task(client.generate("a", base=True, max_tokens=500, ignore_end=True))
        while served.engine.stats().running == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(served.idle, 5)


async def test_closing_the_asyncio_client_in_every_state(served: Served) -> None:
    unused = AsyncClient(served.address)
    await unused.close()
    await unused.close()
    with pytest.raises(ClientClosedError):
        await unused.generate("a", base=True)
    busy = AsyncClient(served.address)
    task = asyncio.create_task(busy.generate("a", base=True, max_tokens=500, ignore_end=True))
    stream = busy.generate_stream("a", base=True, max_tokens=500, ignore_end=True)
    await anext(stream)
    await busy.close()
    with pytest.raises(ClientClosedError):
        await task
    with pytest.raises(ClientClosedError):
        _ = [piece async for piece in stream]
    await asyncio.to_thread(served.idle, 5)
