"""The asyncio client. Belongs to the event loop of its first call; one channel serves all calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, Self, Unpack, cast

import grpc
import grpc.aio

from adapterbay.client import requests, responses, types
from adapterbay.client.channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT, OPTIONS, checked
from adapterbay.client.errors import ClientClosedError, ServerError, from_status
from adapterbay.client.making import Ordered, made
from adapterbay.client.requests import GenerateOptions, Messages, SamplingOptions, SelectionOptions
from adapterbay.client.retry import Deadline, RetryPolicy, checked_policy, checked_timeout
from adapterbay.client.selection import Selection
from adapterbay.client.sync import Res
from adapterbay.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc


class AsyncClient:
    """Calls an adapterbay server from asyncio. Methods and their meaning are those of `Client`."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._address = checked(address, credentials)
        self._credentials = credentials
        self._timeout = checked_timeout(timeout)
        self._retry = checked_policy(retry)
        self._closed = False
        self._channel: grpc.aio.Channel | None = None  # made at the first call: it binds itself to the running loop

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls under way raise ClientClosedError. May be called in any state, and again."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    async def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> types.Generation:
        """Completes a prompt, or `messages`, and returns the whole answer."""
        response = await self._unary(self._inference.Generate, requests.generate(prompt, **options), timeout)
        return responses.generation(response.generation, response.provenance)

    def generate_stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[types.GenerationPiece, None]:
        """Completes a prompt, or `messages`, and yields the text as it comes. Closing the generator ends the call."""
        request = requests.streamed(requests.generate(prompt, **options))
        return self._stream(
            lambda: self._inference.GenerateStream, request, responses.piece, Deadline(timeout, self._timeout)
        )

    async def classify(
        self,
        texts: Ordered[str],
        *,
        truncate: bool = False,
        timeout: float | None = None,
        **selection: Unpack[SelectionOptions],
    ) -> types.Classifications:
        """Labels texts with the head that the adapter brings."""
        request = requests.classify(texts, truncate=truncate, **selection)
        return responses.classifications(await self._unary(self._inference.Classify, request, timeout))

    async def classify_tokens(
        self,
        texts: Ordered[str],
        *,
        truncate: bool = False,
        scores: bool = False,
        timeout: float | None = None,
        **selection: Unpack[SelectionOptions],
    ) -> types.TokenClassifications:
        """Labels each token of texts with the head that the adapter brings; `scores` asks for all labels."""
        request = requests.classify_tokens(texts, truncate=truncate, scores=scores, **selection)
        return responses.token_classifications(await self._unary(self._inference.ClassifyTokens, request, timeout))

    async def embed(
        self,
        texts: Ordered[str],
        *,
        pooling: str = "mean",
        normalize: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
        **selection: Unpack[SelectionOptions],
    ) -> types.Embeddings:
        """Embeds texts. `pooling` is "mean", "first" or "last"."""
        request = requests.embed(texts, pooling=pooling, normalize=normalize, truncate=truncate, **selection)
        return responses.embeddings(await self._unary(self._inference.Embed, request, timeout))

    def compare_generate(
        self,
        arms: Ordered[Selection | str],
        inputs: Ordered[str | Messages],
        *,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerator[types.ComparisonAnswer, None]:
        """Completes each input with every arm, in one batch, and yields answers as they come."""
        request = requests.compare_generate(arms, inputs, **options)
        return self._stream(
            lambda: self._inference.Compare, request, responses.comparison_answer, Deadline(timeout, default=None)
        )

    def compare_classify(
        self,
        arms: Ordered[Selection | str],
        texts: Ordered[str],
        *,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[types.ComparisonAnswer, None]:
        """Labels each text with every arm, in one batch, and yields answers as they come."""
        request = requests.compare_classify(arms, texts, truncate=truncate)
        return self._stream(
            lambda: self._inference.Compare, request, responses.comparison_answer, Deadline(timeout, default=None)
        )

    async def list_adapters(
        self,
        name_prefix: str = "",
        *,
        resident_only: bool = False,
        all_versions: bool = False,
        page_size: int = 100,
        timeout: float | None = None,
    ) -> AsyncIterator[types.AdapterInfo]:
        """All adapters that match, page by page."""
        token = ""
        while True:
            request = made(
                adapters_pb2.ListAdaptersRequest,
                name_prefix=name_prefix,
                resident_only=resident_only,
                all_versions=all_versions,
                page_size=page_size,
                page_token=token,
            )
            page = responses.adapter_page(await self._unary(self._adapters.ListAdapters, request, timeout))
            for adapter in page:
                yield adapter
            token = page.next_page_token
            if not token:
                return

    async def get_adapter(self, adapter: str, *, timeout: float | None = None) -> types.AdapterInfo:
        """Resolves a reference; the answer has `manifest_json`."""
        request = made(adapters_pb2.GetAdapterRequest, adapter=adapter)
        response = await self._unary(self._adapters.GetAdapter, request, timeout)
        return responses.adapter(response.adapter, response.manifest_json)

    async def load_adapter(self, adapter: str, *, timeout: float | None = None) -> types.LoadedAdapter:
        """Brings a version into memory before it is asked for."""
        request = made(adapters_pb2.LoadAdapterRequest, adapter=adapter)
        return responses.loaded(await self._unary(self._adapters.LoadAdapter, request, timeout))

    async def unload_adapter(self, adapter: str, *, timeout: float | None = None) -> types.UnloadedAdapter:
        """Gives a version's memory back."""
        request = made(adapters_pb2.UnloadAdapterRequest, adapter=adapter)
        return responses.unloaded(await self._unary(self._adapters.UnloadAdapter, request, timeout))

    async def pin_adapter(
        self, adapter: str, pinned: bool = True, *, timeout: float | None = None
    ) -> types.AdapterInfo:
        """Keeps a version in memory, or lets it go again."""
        request = made(adapters_pb2.PinAdapterRequest, adapter=adapter, pinned=pinned)
        return responses.adapter((await self._unary(self._adapters.PinAdapter, request, timeout)).adapter)

    def watch_adapters(
        self, name_prefix: str = "", *, snapshot: bool = False, timeout: float | None = None
    ) -> AsyncGenerator[types.AdapterChange, None]:
        """Yields changes until the generator is closed."""
        request = made(adapters_pb2.WatchAdaptersRequest, name_prefix=name_prefix, snapshot=snapshot)
        return self._stream(
            lambda: self._adapters.WatchAdapters, request, responses.change, Deadline(timeout, default=None)
        )

    @property
    def _inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        return inference_pb2_grpc.InferenceServiceStub(self._open_channel())

    @property
    def _adapters(self) -> adapters_pb2_grpc.AdapterServiceAsyncStub:
        return adapters_pb2_grpc.AdapterServiceStub(self._open_channel())

    def _open_channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise ClientClosedError
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._address, options=OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self._address, self._credentials, options=OPTIONS)
        return self._channel

    async def _unary(self, method: Callable[..., Any], request: object, timeout: float | None) -> Any:
        deadline = Deadline(timeout, self._timeout)
        attempt = 1
        while True:
            try:
                return await self._start(method, request, deadline)
            except grpc.aio.AioRpcError as failure:
                error = _error(failure)
            except asyncio.CancelledError:
                self._raise_if_closed()
                raise
            await self._wait_or_raise(error, attempt, deadline)
            attempt += 1

    async def _stream(
        self,
        method: Callable[[], Callable[..., Any]],
        request: object,
        convert: Callable[[Any], Res],
        deadline: Deadline,
    ) -> AsyncGenerator[Res, None]:
        attempt, yielded = 1, False
        while True:
            call = self._start(method(), request, deadline)
            try:
                async for message in call:
                    yielded = True
                    yield convert(message)
                return
            except grpc.aio.AioRpcError as failure:
                error = _error(failure)
            except asyncio.CancelledError:
                self._raise_if_closed()
                raise
            finally:
                call.cancel()
            if yielded:
                raise error
            await self._wait_or_raise(error, attempt, deadline)
            attempt += 1

    def _start(self, method: Callable[..., Any], request: object, deadline: Deadline) -> Any:
        if self._closed:
            raise ClientClosedError
        try:
            return method(request, timeout=deadline.remaining())
        except grpc.aio.UsageError as error:  # what gRPC raises on a closed channel
            raise ClientClosedError from error

    def _raise_if_closed(self) -> None:
        """gRPC cancels the calls of a channel that is closed; that is not a cancellation of the caller's task."""
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise ClientClosedError

    async def _wait_or_raise(self, error: ServerError, attempt: int, deadline: Deadline) -> None:
        wait = self._retry.wait_seconds(error, attempt, deadline.remaining())
        if wait is None:
            raise error
        await asyncio.sleep(wait)


def _error(failure: grpc.aio.AioRpcError) -> ServerError:
    trailing = cast(Iterable[tuple[str, str | bytes]], failure.trailing_metadata())  # pairs; the stubs say otherwise
    return from_status(failure.code(), failure.details(), trailing)
