"""AdapterService over a real server: listing by pages, loading, pinning, and watching what happens."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import pytest
from serving_tools import Failure, Served

from adapterbay.registry.errors import QueueFull
from adapterbay.server.watch import Watcher
from adapterbay.v1 import adapters_pb2 as pb
from adapterbay.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

Stub = adapters_pb2_grpc.AdapterServiceStub


def listed(stub: Stub, **fields: object) -> list[pb.Adapter]:
    found: list[pb.Adapter] = []
    token = ""
    while True:
        response = stub.ListAdapters(pb.ListAdaptersRequest(page_token=token, **fields))  # type: ignore[arg-type]
        found += response.adapters
        token = response.next_page_token
        if not token:
            return found


@pytest.fixture(scope="module")
def versions(served: Served) -> str:
    """A name with five versions; aliases on the second and fourth."""
    registry, folders = served.zoo.registry, served.zoo.folders
    for source in ("tales", "songs", "tales", "songs", "tales"):
        registry.push(folders[source], "many", base=f"folder:{served.zoo.base}")
    registry.set_alias("many", "old", 2)
    registry.set_alias("many", "champion", 4)
    return "many"


def test_pages_join_to_the_whole_listing(adapters: Stub, versions: str) -> None:
    whole = [(a.name, a.version) for a in listed(adapters, all_versions=True, page_size=1000)]
    assert whole == sorted(whole)
    assert len(whole) == len(set(whole))
    for size in (1, 2, 3, 7):
        paged = [(a.name, a.version) for a in listed(adapters, all_versions=True, page_size=size)]
        assert paged == whole
    assert [v for n, v in whole if n == versions] == [1, 2, 3, 4, 5]


def test_the_default_listing_is_latest_and_aliased(adapters: Stub, versions: str) -> None:
    found = {a.version: list(a.aliases) for a in listed(adapters, name_prefix=versions)}
    assert found == {2: ["old"], 4: ["champion"], 5: []}
    assert {a.name for a in listed(adapters, name_prefix="sentiment")} == {"sentiment", "sentiment-b"}
    assert listed(adapters, name_prefix="no such prefix") == []


def test_a_token_belongs_to_its_listing(adapters: Stub, versions: str) -> None:
    first = adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1, all_versions=True))
    with pytest.raises(grpc.RpcError) as caught:
        adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1, page_token=first.next_page_token))
    assert Failure(caught.value).field == "page_token"


def test_get_tells_all_about_a_version(adapters: Stub, served: Served) -> None:
    response = adapters.GetAdapter(pb.GetAdapterRequest(adapter="sentiment@champion"))
    record = served.zoo.registry.version("sentiment", 1)
    adapter = response.adapter
    assert (adapter.name, adapter.version, adapter.digest) == ("sentiment", 1, record.digest)
    assert list(adapter.aliases) == ["champion"]
    assert (adapter.task, adapter.method, adapter.rank) == ("sequence-classification", "LORA", 4)
    assert list(adapter.labels) == ["no", "yes"]
    assert adapter.base_fingerprint == served.engine.base.fingerprint
    assert adapter.servable
    assert adapter.size_bytes == record.size_bytes > 0
    assert adapter.created_at.ToDatetime() == record.created_at.replace(tzinfo=None)
    assert response.manifest_json.encode() == served.zoo.registry.manifest(record.digest).to_bytes()
    assert not adapters.GetAdapter(pb.GetAdapterRequest(adapter="foreign")).adapter.servable


def test_load_pin_unload(adapters: Stub, served: Served) -> None:
    adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="songs"))
    assert adapters.GetAdapter(pb.GetAdapterRequest(adapter="songs")).adapter.residency == pb.RESIDENCY_REGISTRY
    loaded = adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="songs"))
    assert loaded.load_seconds > 0
    assert loaded.adapter.residency in {pb.RESIDENCY_HOST, pb.RESIDENCY_DEVICE}
    assert loaded.adapter.resident_bytes > 0
    assert adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="songs@1")).load_seconds == 0
    assert "songs" in {a.name for a in listed(adapters, resident_only=True)}

    pinned = adapters.PinAdapter(pb.PinAdapterRequest(adapter="songs", pinned=True)).adapter
    assert pinned.pinned
    with pytest.raises(grpc.RpcError) as caught:
        adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="songs"))
    assert Failure(caught.value).code is grpc.StatusCode.INVALID_ARGUMENT
    assert Failure(caught.value).message == f"songs@1 ({pinned.digest}) is pinned; unpin it before unloading."
    assert not adapters.PinAdapter(pb.PinAdapterRequest(adapter="songs", pinned=False)).adapter.pinned

    freed = adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="songs"))
    assert freed.freed_bytes > 0
    assert (freed.adapter.residency, freed.adapter.resident_bytes) == (pb.RESIDENCY_REGISTRY, 0)
    assert adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="songs")).freed_bytes == 0
    assert "songs" not in {a.name for a in listed(adapters, resident_only=True)}


def test_unloading_lets_running_rows_finish(
    adapters: Stub, inference: inference_pb2_grpc.InferenceServiceStub, served: Served
) -> None:
    request = inference_pb2.GenerateStreamRequest(
        adapter="songs", prompt="a", sampling=inference_pb2.Sampling(max_tokens=300, ignore_end=True)
    )
    stream = inference.GenerateStream(request)
    next(stream)
    assert adapters.GetAdapter(pb.GetAdapterRequest(adapter="songs")).adapter.active_rows == 1
    adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="songs"))
    assert sum(len(piece.token_ids) for piece in stream) > 250
    served.idle()


@dataclass
class Watched:
    """A watch that runs on a thread of its own."""

    responses: list[pb.WatchAdaptersResponse]
    call: object

    def wait_for(
        self, wanted: Callable[[pb.WatchAdaptersResponse], bool], seconds: float = 10
    ) -> pb.WatchAdaptersResponse:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for response in list(self.responses):
                if wanted(response):
                    return response
            time.sleep(0.01)
        raise AssertionError(f"no such event among {[r.type for r in self.responses]}")


def watch(stub: Stub, **fields: object) -> Watched:
    call = stub.WatchAdapters(pb.WatchAdaptersRequest(**fields))  # type: ignore[arg-type]
    watched = Watched([], call)

    def read() -> None:
        try:
            for response in call:
                watched.responses.append(response)
        except grpc.RpcError:
            return

    threading.Thread(target=read, daemon=True).start()
    return watched


def test_watching_tells_pushes_aliases_and_loads(adapters: Stub, served: Served) -> None:
    registry, folders = served.zoo.registry, served.zoo.folders
    registry.push(folders["tales"], "seen", base=f"folder:{served.zoo.base}")
    first = watch(adapters, name_prefix="seen", snapshot=True)
    second = watch(adapters)
    snapshot = first.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_SNAPSHOT)
    assert (snapshot.adapter.name, snapshot.adapter.version) == ("seen", 1)
    for canary in range(500):  # the second watch has no snapshot to tell us that it began
        registry.set_alias("tales", f"canary-{canary}", 1)
        time.sleep(0.05)
        if second.responses:
            break

    registry.push(folders["songs"], "seen", base=f"folder:{served.zoo.base}", aliases=["live"])
    registry.set_alias("seen", "live", 1, expected=2)
    registry.remove_alias("seen", "live")
    adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="seen@2"))
    adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="seen@2"))
    for watched in (first, second):
        pushed = watched.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_PUSHED and r.adapter.name == "seen")
        assert pushed.adapter.version == 2
        assert pushed.adapter.digest == registry.version("seen", 2).digest
        assert pushed.HasField("at")
        fresh = watched.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_ALIAS_SET and r.alias.version == 2)
        assert fresh.previous_version == 0
        moved = watched.wait_for(
            lambda r: r.type == pb.ADAPTER_EVENT_TYPE_ALIAS_SET and (r.alias.name, r.alias.version) == ("live", 1)
        )
        assert (moved.alias.name, moved.previous_version, moved.adapter.version) == ("live", 2, 1)
        removed = watched.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_ALIAS_REMOVED)
        assert removed.alias.name == "live"
        assert removed.previous_version == 1
        watched.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_LOADED and r.adapter.name == "seen")
        watched.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_UNLOADED and r.adapter.name == "seen")
        watched.call.cancel()  # type: ignore[attr-defined]
    assert {response.adapter.name for response in first.responses} == {"seen"}
    for number in range(canary + 1):
        registry.remove_alias("tales", f"canary-{number}")


def test_a_load_that_fails_is_told(adapters: Stub, served: Served) -> None:
    served.zoo.add("broken", served.zoo.folders["songs"].parent / "broken", targets=["v_proj"], rank=2, seed=77)
    registry = served.zoo.registry
    stored = registry.open_snapshot(registry.resolve("broken").digest).files["adapter_model.safetensors"]
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes()[:-4])
    watched = watch(adapters, name_prefix="broken", snapshot=True)
    watched.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_SNAPSHOT)
    with pytest.raises(grpc.RpcError) as caught:
        adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="broken"))
    assert Failure(caught.value).reason == "CORRUPTED"
    failed = watched.wait_for(lambda r: r.type == pb.ADAPTER_EVENT_TYPE_LOAD_FAILED)
    assert failed.message
    watched.call.cancel()  # type: ignore[attr-defined]


async def test_a_slow_watcher_ends_with_an_error_and_bounded_memory() -> None:
    watcher = Watcher(capacity=3)
    changes = watcher.changes()

    @dataclass(frozen=True)
    class Event:
        kind: str = "loaded"
        digest: str = ""
        message: str = ""
        at: float = 0.0

    watcher.put(Event())
    assert await anext(changes) == Event()
    for _ in range(10):
        watcher.put(Event())
    assert watcher._changes.qsize() <= 1
    with pytest.raises(QueueFull) as caught:
        await asyncio.wait_for(anext(changes), 1)
    assert caught.value.reason == "WATCHER_TOO_SLOW"
