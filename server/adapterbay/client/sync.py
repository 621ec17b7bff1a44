"""The synchronous client. Safe to share between threads; one channel serves all calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from adapterbay.client import requests, responses, types
from adapterbay.client.channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT, OPTIONS, checked
from adapterbay.client.errors import ClientClosedError, ServerError, from_status
from adapterbay.client.making import Ordered, made
from adapterbay.client.requests import GenerateOptions, Messages, SamplingOptions, SelectionOptions
from adapterbay.client.retry import Deadline, RetryPolicy, checked_policy, checked_timeout
from adapterbay.client.selection import Selection
from adapterbay.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc

Req = TypeVar("Req")
Res = TypeVar("Res")


class Client:
    """Calls an adapterbay server.

    `timeout` in seconds is the deadline of a call with all its retries; each method may set its own, and `math.inf`
    means none. Comparisons and watches have no default deadline. Only UNAVAILABLE is retried, and never a stream that
    has yielded. Failures raise `ServerError` subclasses.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        checked(address, credentials)
        self._timeout = checked_timeout(timeout)
        self._retry = checked_policy(retry)
        self._closed = False
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; calls under way end as cancelled. May be called in any state, and again."""
        self._closed = True
        self._channel.close()

    def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> types.Generation:
        """Completes a prompt, or `messages`, and returns the whole answer."""
        response = self._unary(self._inference.Generate, requests.generate(prompt, **options), timeout)
        return responses.generation(response.generation, response.provenance)

    def generate_stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[types.GenerationPiece, None, None]:
        """Completes a prompt, or `messages`, and yields the text as it comes. Closing the generator ends the call."""
        request = requests.streamed(requests.generate(prompt, **options))
        return self._stream(self._inference.GenerateStream, request, responses.piece, Deadline(timeout, self._timeout))

    def classify(
        self,
        texts: Ordered[str],
        *,
        truncate: bool = False,
        timeout: float | None = None,
        **selection: Unpack[SelectionOptions],
    ) -> types.Classifications:
        """Labels texts with the head that the adapter brings."""
        request = requests.classify(texts, truncate=truncate, **selection)
        return responses.classifications(self._unary(self._inference.Classify, request, timeout))

    def classify_tokens(
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
        return responses.token_classifications(self._unary(self._inference.ClassifyTokens, request, timeout))

    def embed(
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
        return responses.embeddings(self._unary(self._inference.Embed, request, timeout))

    def compare_generate(
        self,
        arms: Ordered[Selection | str],
        inputs: Ordered[str | Messages],
        *,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generator[types.ComparisonAnswer, None, None]:
        """Completes each input with every arm, in one batch, and yields answers as they come."""
        request = requests.compare_generate(arms, inputs, **options)
        return self._stream(
            self._inference.Compare, request, responses.comparison_answer, Deadline(timeout, default=None)
        )

    def compare_classify(
        self,
        arms: Ordered[Selection | str],
        texts: Ordered[str],
        *,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Generator[types.ComparisonAnswer, None, None]:
        """Labels each text with every arm, in one batch, and yields answers as they come."""
        request = requests.compare_classify(arms, texts, truncate=truncate)
        return self._stream(
            self._inference.Compare, request, responses.comparison_answer, Deadline(timeout, default=None)
        )

    def list_adapters(
        self,
        name_prefix: str = "",
        *,
        resident_only: bool = False,
        all_versions: bool = False,
        page_size: int = 100,
        timeout: float | None = None,
    ) -> Iterator[types.AdapterInfo]:
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
            page = responses.adapter_page(self._unary(self._adapters.ListAdapters, request, timeout))
            yield from page
            token = page.next_page_token
            if not token:
                return

    def get_adapter(self, adapter: str, *, timeout: float | None = None) -> types.AdapterInfo:
        """Resolves a reference; the answer has `manifest_json`."""
        request = made(adapters_pb2.GetAdapterRequest, adapter=adapter)
        response = self._unary(self._adapters.GetAdapter, request, timeout)
        return responses.adapter(response.adapter, response.manifest_json)

    def load_adapter(self, adapter: str, *, timeout: float | None = None) -> types.LoadedAdapter:
        """Brings a version into memory before it is asked for."""
        request = made(adapters_pb2.LoadAdapterRequest, adapter=adapter)
        return responses.loaded(self._unary(self._adapters.LoadAdapter, request, timeout))

    def unload_adapter(self, adapter: str, *, timeout: float | None = None) -> types.UnloadedAdapter:
        """Gives a version's memory back."""
        request = made(adapters_pb2.UnloadAdapterRequest, adapter=adapter)
        return responses.unloaded(self._unary(self._adapters.UnloadAdapter, request, timeout))

    def pin_adapter(self, adapter: str, pinned: bool = True, *, timeout: float | None = None) -> types.AdapterInfo:
        """Keeps a version in memory, or lets it go again."""
        request = made(adapters_pb2.PinAdapterRequest, adapter=adapter, pinned=pinned)
        return responses.adapter(self._unary(self._adapters.PinAdapter, request, timeout).adapter)

    def watch_adapters(
        self, name_prefix: str = "", *, snapshot: bool = False, timeout: float | None = None
    ) -> Generator[types.AdapterChange, None, None]:
        """Yields changes until the generator is closed."""
        request = made(adapters_pb2.WatchAdaptersRequest, name_prefix=name_prefix, snapshot=snapshot)
        return self._stream(self._adapters.WatchAdapters, request, responses.change, Deadline(timeout, default=None))

    def _unary(self, method: Callable[..., Res], request: object, timeout: float | None) -> Res:
        deadline = Deadline(timeout, self._timeout)
        attempt = 1
        while True:
            try:
                return self._start(method, request, deadline)
            except grpc.RpcError as failure:
                error = _error(failure)
            self._wait_or_raise(error, attempt, deadline)
            attempt += 1

    def _stream(
        self,
        method: Callable[..., Any],
        request: object,
        convert: Callable[[Any], Res],
        deadline: Deadline,
    ) -> Generator[Res, None, None]:
        attempt, yielded = 1, False
        while True:
            call = self._start(method, request, deadline)
            try:
                for message in call:
                    yielded = True
                    yield convert(message)
                return
            except grpc.RpcError as failure:
                error = _error(failure)
            finally:
                call.cancel()
            if yielded:
                raise error
            self._wait_or_raise(error, attempt, deadline)
            attempt += 1

    def _start(self, method: Callable[..., Res], request: object, deadline: Deadline) -> Res:
        if self._closed:
            raise ClientClosedError
        try:
            return method(request, timeout=deadline.remaining())
        except ValueError as error:  # what gRPC raises if the channel was closed between the check and the call
            raise ClientClosedError from error

    def _wait_or_raise(self, error: ServerError, attempt: int, deadline: Deadline) -> None:
        wait = self._retry.wait_seconds(error, attempt, deadline.remaining())
        if wait is None:
            raise error
        time.sleep(wait)


def _error(failure: grpc.RpcError) -> ServerError:
    if not isinstance(failure, grpc.Call):
        raise TypeError("gRPC raised an error without a status") from failure
    return from_status(failure.code(), failure.details(), failure.trailing_metadata())
