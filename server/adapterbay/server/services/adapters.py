"""AdapterService: the registry as this server sees it, and what of it is in memory."""

# ruff: noqa: ARG002 - gRPC gives every method a context, and only some have a use for it

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from adapterbay.registry import RegistryEvent
from adapterbay.registry.errors import AdapterbayError
from adapterbay.server.requests import ArmSpec, Part
from adapterbay.server.services.arms import named, resolve_arm
from adapterbay.server.services.catalog import Catalog, Listing, read_page_size, read_token, write_token
from adapterbay.server.services.ports import EnginePort
from adapterbay.server.services.selection import Selected, read_reference
from adapterbay.server.watch import AdapterFeed, Change
from adapterbay.v1 import adapters_pb2, adapters_pb2_grpc

Req = TypeVar("Req")
Res = TypeVar("Res")
T = TypeVar("T")
Context = grpc.aio.ServicerContext[Req, Res]

REGISTRY_EVENTS = {
    "pushed": adapters_pb2.ADAPTER_EVENT_TYPE_PUSHED,
    "alias_set": adapters_pb2.ADAPTER_EVENT_TYPE_ALIAS_SET,
    "alias_removed": adapters_pb2.ADAPTER_EVENT_TYPE_ALIAS_REMOVED,
}
RESIDENCY_EVENTS = {
    "loaded": adapters_pb2.ADAPTER_EVENT_TYPE_LOADED,
    "unloaded": adapters_pb2.ADAPTER_EVENT_TYPE_UNLOADED,
    "load_failed": adapters_pb2.ADAPTER_EVENT_TYPE_LOAD_FAILED,
}


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Lists, loads, unloads, pins and watches. Methods raise AdapterbayError; `gate` makes it a status."""

    def __init__(self, engine: EnginePort, feed: AdapterFeed) -> None:
        self._adapters = engine.adapters
        self._catalog = Catalog(engine)
        self._feed = feed

    async def ListAdapters(
        self,
        request: adapters_pb2.ListAdaptersRequest,
        context: Context[adapters_pb2.ListAdaptersRequest, adapters_pb2.ListAdaptersResponse],
    ) -> adapters_pb2.ListAdaptersResponse:
        """One page of adapters."""
        listing = Listing(request.name_prefix, request.resident_only, request.all_versions)
        size = read_page_size(request.page_size)
        after = read_token(listing, request.page_token)
        adapters, last = await asyncio.to_thread(self._catalog.page, listing, after, size)
        token = write_token(listing, last) if last is not None else ""
        return adapters_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def GetAdapter(
        self,
        request: adapters_pb2.GetAdapterRequest,
        context: Context[adapters_pb2.GetAdapterRequest, adapters_pb2.GetAdapterResponse],
    ) -> adapters_pb2.GetAdapterResponse:
        """All about one version."""
        part = await self._resolve(request.adapter)
        return adapters_pb2.GetAdapterResponse(
            adapter=await self._now(part),
            manifest_json=await asyncio.to_thread(self._catalog.manifest_json, part.digest),
        )

    async def LoadAdapter(
        self,
        request: adapters_pb2.LoadAdapterRequest,
        context: Context[adapters_pb2.LoadAdapterRequest, adapters_pb2.LoadAdapterResponse],
    ) -> adapters_pb2.LoadAdapterResponse:
        """Brings a version into memory. The load goes on if the caller leaves: others may wait for it too."""
        part = await self._resolve(request.adapter)
        with _naming(part):
            seconds = await _outcome(await asyncio.to_thread(self._adapters.load, part.digest))
        return adapters_pb2.LoadAdapterResponse(adapter=await self._now(part), load_seconds=seconds)

    async def UnloadAdapter(
        self,
        request: adapters_pb2.UnloadAdapterRequest,
        context: Context[adapters_pb2.UnloadAdapterRequest, adapters_pb2.UnloadAdapterResponse],
    ) -> adapters_pb2.UnloadAdapterResponse:
        """Gives a version's memory back, once the rows that run on it are done."""
        part = await self._resolve(request.adapter)
        with _naming(part):
            freed = await _outcome(await asyncio.to_thread(self._adapters.unload, part.digest))
        return adapters_pb2.UnloadAdapterResponse(adapter=await self._now(part), freed_bytes=freed)

    async def PinAdapter(
        self,
        request: adapters_pb2.PinAdapterRequest,
        context: Context[adapters_pb2.PinAdapterRequest, adapters_pb2.PinAdapterResponse],
    ) -> adapters_pb2.PinAdapterResponse:
        """Keeps a version in memory, loading it if need be, or lets it go again."""
        part = await self._resolve(request.adapter)
        with _naming(part):
            if request.pinned:
                await _outcome(await asyncio.to_thread(self._adapters.load, part.digest))
            await asyncio.to_thread(self._adapters.pin, part.digest, request.pinned)
        return adapters_pb2.PinAdapterResponse(adapter=await self._now(part))

    async def WatchAdapters(
        self,
        request: adapters_pb2.WatchAdaptersRequest,
        context: Context[adapters_pb2.WatchAdaptersRequest, adapters_pb2.WatchAdaptersResponse],
    ) -> AsyncIterator[adapters_pb2.WatchAdaptersResponse]:
        """Changes from the call's arrival on; a change during the snapshot may be in it and follow it as well."""
        with self._feed.watcher() as watcher:
            before = await asyncio.to_thread(self._adapters.registry.last_event)  # the feed may lag behind it
            if request.snapshot:
                listing = Listing(name_prefix=request.name_prefix)
                for adapter in await asyncio.to_thread(self._catalog.all, listing):
                    at = Timestamp()
                    at.GetCurrentTime()
                    yield adapters_pb2.WatchAdaptersResponse(
                        type=adapters_pb2.ADAPTER_EVENT_TYPE_SNAPSHOT, adapter=adapter, at=at
                    )
            async for change in watcher.changes():
                if isinstance(change, RegistryEvent) and change.sequence <= before:
                    continue
                for response in await asyncio.to_thread(self._told, change, request.name_prefix):
                    yield response

    async def _resolve(self, reference: str) -> Part:
        choice = read_reference(reference, "adapter")
        return (await asyncio.to_thread(resolve_arm, self._adapters, Selected((choice,)))).parts[0]

    async def _now(self, part: Part) -> adapters_pb2.Adapter:
        return await asyncio.to_thread(self._catalog.find, part.name, part.version)

    def _told(self, change: Change, prefix: str) -> Sequence[adapters_pb2.WatchAdaptersResponse]:
        """A change as messages: one for each version that it concerns and that is watched."""
        at = Timestamp()
        if isinstance(change, RegistryEvent):
            if not change.name.startswith(prefix):
                return []
            at.FromDatetime(change.at)
            adapter = self._catalog.find(change.name, change.version)
            adapter.digest = change.digest
            response = adapters_pb2.WatchAdaptersResponse(
                type=REGISTRY_EVENTS[change.kind], adapter=adapter, previous_version=change.previous_version or 0, at=at
            )
            if change.alias is not None:
                response.alias.CopyFrom(adapters_pb2.Alias(name=change.alias, version=change.version))
            return [response]
        at.FromNanoseconds(round(change.at * 1e9))
        return [
            adapters_pb2.WatchAdaptersResponse(
                type=RESIDENCY_EVENTS[change.kind], adapter=adapter, message=change.message, at=at
            )
            for adapter in self._catalog.with_digest(change.digest)
            if adapter.name.startswith(prefix)
        ]


@contextlib.contextmanager
def _naming(part: Part) -> Iterator[None]:
    """Errors tell of a version by its name."""
    try:
        yield
    except AdapterbayError as error:
        raise named(error, [ArmSpec((part,))]) from error


async def _outcome(future: Future[T]) -> T:
    """The future's result. A caller that leaves does not cancel what others wait for."""
    return await asyncio.shield(asyncio.wrap_future(future))
