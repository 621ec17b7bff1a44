"""InferenceService: validate, resolve, encode, submit, answer. Knows nothing of how a batch is made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeVar, cast

import grpc.aio

from adapterbay.registry.errors import AdapterbayError, InvalidArgument, TaskMismatch
from adapterbay.server.requests import (
    ArmSpec,
    ClassifyResult,
    ClassifyTask,
    ClassifyTokensResult,
    ClassifyTokensTask,
    Delta,
    EmbedResult,
    EmbedTask,
    GenerateResult,
    GenerateTask,
    PositionChances,
    Task,
    Timings,
)
from adapterbay.server.services import messages
from adapterbay.server.services.arms import arm_at_once, require_head, resolve_arm, text_limit, text_room
from adapterbay.server.services.calls import Call, run_groups
from adapterbay.server.services.comparison import compare
from adapterbay.server.services.encode import Encoder
from adapterbay.server.services.ports import EnginePort
from adapterbay.server.services.selection import Selected, read_selection
from adapterbay.server.services.validate import (
    GenerateMessage,
    read_conversation,
    read_pooling,
    read_sampling,
    read_texts,
    require_prompt,
)
from adapterbay.v1 import inference_pb2, inference_pb2_grpc

Req = TypeVar("Req")
Res = TypeVar("Res")
Context = grpc.aio.ServicerContext[Req, Res]
Encoded = TypeVar("Encoded", covariant=True)
TextResult = TypeVar("TextResult", ClassifyResult, ClassifyTokensResult, EmbedResult)


class TextEncoder(Protocol[Encoded]):
    """A method of `Encoder` for texts."""

    def __call__(self, text: str, *, limit: int, truncate: bool, field: str) -> Encoded:
        """What one text becomes."""


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Answers from one base and many adapters.

    Methods raise AdapterbayError; `gate` turns it into a gRPC status. Streams are async generators that the
    gate closes when the caller goes away, which frees their rows.
    """

    def __init__(self, engine: EnginePort) -> None:
        self._engine = engine
        self._encoder = Encoder(engine.tokenizer, engine.base.max_length, apart=engine.base.kind == "encoder-decoder")

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: Context[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
    ) -> inference_pb2.GenerateResponse:
        """Completes a prompt or a conversation and returns the whole answer."""
        with Call(self._engine, context.time_remaining()) as call:
            arm, task = await self._generation(request)
            call.submit(0, [(arm, task)])
            result = cast(GenerateResult, await call.result())
        return inference_pb2.GenerateResponse(
            generation=messages.generation(result),
            provenance=messages.provenance(self._engine.base, arm, result.timings),
        )

    async def GenerateStream(
        self,
        request: inference_pb2.GenerateStreamRequest,
        context: Context[inference_pb2.GenerateStreamRequest, inference_pb2.GenerateStreamResponse],
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        """Completes a prompt or a conversation and streams the text as it comes."""
        with Call(self._engine, context.time_remaining(), streams=True) as call:
            arm, task = await self._generation(request)
            call.submit(0, [(arm, task)])
            prompt_tokens = len(task.prompt_ids)
            async for piece in _pieces(call):
                if isinstance(piece, Delta):
                    yield inference_pb2.GenerateStreamResponse(
                        text=piece.text,
                        token_ids=piece.token_ids,
                        log_probabilities=messages.chances(piece.chances),
                        prompt_tokens=prompt_tokens,
                    )
                else:
                    yield inference_pb2.GenerateStreamResponse(
                        finish_reason=messages.FINISH_REASONS[piece.finish_reason],
                        stop=piece.stop,
                        prompt_tokens=prompt_tokens,
                        provenance=messages.provenance(self._engine.base, arm, piece.timings),
                    )
                prompt_tokens = 0

    async def Classify(
        self,
        request: inference_pb2.ClassifyRequest,
        context: Context[inference_pb2.ClassifyRequest, inference_pb2.ClassifyResponse],
    ) -> inference_pb2.ClassifyResponse:
        """Labels texts with the classification head that the adapter brings."""
        with Call(self._engine, context.time_remaining()) as call:
            texts, selected = read_texts(request.texts), read_selection(request)
            arm, encoded = await asyncio.to_thread(
                self._encoded, selected, texts, request.truncate, self._encoder.text, labelled=True
            )
            tasks = [ClassifyTask(token_ids=ids, truncated=cut) for ids, cut in encoded]
            results, timings = await self._run_texts(call, arm, tasks, ClassifyResult)
        return inference_pb2.ClassifyResponse(
            classifications=[messages.classification(result) for result in results],
            provenance=messages.provenance(self._engine.base, arm, timings),
        )

    async def ClassifyTokens(
        self,
        request: inference_pb2.ClassifyTokensRequest,
        context: Context[inference_pb2.ClassifyTokensRequest, inference_pb2.ClassifyTokensResponse],
    ) -> inference_pb2.ClassifyTokensResponse:
        """Labels each token of texts with the head that the adapter brings."""
        with Call(self._engine, context.time_remaining()) as call:
            texts, selected = read_texts(request.texts), read_selection(request)
            arm, encoded = await asyncio.to_thread(
                self._encoded, selected, texts, request.truncate, self._encoder.spans, labelled=True
            )
            tasks = [ClassifyTokensTask(token_ids=ids, truncated=cut) for ids, _, cut in encoded]
            results, timings = await self._run_texts(call, arm, tasks, ClassifyTokensResult)
        return inference_pb2.ClassifyTokensResponse(
            classifications=[
                messages.token_classification(result, text, places, scores=request.scores)
                for result, text, (_, places, _) in zip(results, texts, encoded, strict=True)
            ],
            provenance=messages.provenance(self._engine.base, arm, timings),
        )

    async def Embed(
        self,
        request: inference_pb2.EmbedRequest,
        context: Context[inference_pb2.EmbedRequest, inference_pb2.EmbedResponse],
    ) -> inference_pb2.EmbedResponse:
        """Embeds texts by pooling the last hidden states."""
        with Call(self._engine, context.time_remaining()) as call:
            texts = read_texts(request.texts)
            pooling, selected = read_pooling(request.pooling), read_selection(request)
            arm, encoded = await asyncio.to_thread(
                self._encoded, selected, texts, request.truncate, self._encoder.text, labelled=False
            )
            tasks = [
                EmbedTask(token_ids=ids, pooling=pooling, normalize=request.normalize, truncated=cut)
                for ids, cut in encoded
            ]
            results, timings = await self._run_texts(call, arm, tasks, EmbedResult)
        return inference_pb2.EmbedResponse(
            embeddings=[messages.embedding(result) for result in results],
            provenance=messages.provenance(self._engine.base, arm, timings),
        )

    async def Compare(
        self,
        request: inference_pb2.CompareRequest,
        context: Context[inference_pb2.CompareRequest, inference_pb2.CompareResponse],
    ) -> AsyncIterator[inference_pb2.CompareResponse]:
        """Runs the same inputs through several arms and streams each arm's answers as they come."""
        with Call(self._engine, context.time_remaining()) as call:
            async for response in compare(self._engine, self._encoder, call, request):
                yield response

    async def _generation(self, request: GenerateMessage) -> tuple[ArmSpec, GenerateTask]:
        """Everything that a generation needs, checked; settings before the registry is asked."""
        selected = read_selection(request)
        options = request.log_probabilities if request.HasField("log_probabilities") else None
        sampling = read_sampling(request.sampling, options)
        which = request.WhichOneof("input")
        if which is None:
            raise InvalidArgument("There is nothing to complete: set `prompt` or `conversation`.", field="input")
        if which == "prompt":
            require_prompt(request.prompt, "prompt")
        conversation = read_conversation(request.conversation, "conversation") if which == "conversation" else []
        require_generator(self._engine)

        def encode() -> tuple[int, ...]:
            if which == "prompt":
                return self._encoder.prompt(request.prompt, "prompt")
            return self._encoder.conversation(conversation, "conversation")

        def prepare() -> tuple[ArmSpec, tuple[int, ...]]:
            return resolve_arm(self._engine.adapters, selected), encode()

        with self._encoder.at_once([request.prompt, *(message["content"] for message in conversation)]) as here:
            known = arm_at_once(self._engine.adapters, selected) if here else None
            prepared = None if known is None else (known, encode())
        if prepared is None:
            prepared = await asyncio.to_thread(prepare)
        arm, ids = prepared
        # Whoever asked for no number gets what the engine finds left, virtual tokens counted in.
        self._encoder.new_tokens(len(ids), sampling.max_tokens, "sampling.max_tokens")
        return arm, GenerateTask(prompt_ids=ids, sampling=sampling)

    def _encoded(
        self, selected: Selected, texts: Sequence[str], truncate: bool, encode: TextEncoder[Encoded], *, labelled: bool
    ) -> tuple[ArmSpec, list[Encoded]]:
        """The arm, and all texts at once, so that a bad one is refused before anything runs. May block."""
        arm = resolve_arm(self._engine.adapters, selected)
        if labelled:
            require_head(arm)
        limit_of = text_limit if labelled else text_room
        limit = limit_of(self._engine.adapters, arm, self._engine.base.max_length)
        return arm, [
            encode(text, limit=limit, truncate=truncate, field=f"texts[{index}]") for index, text in enumerate(texts)
        ]

    async def _run_texts(
        self, call: Call, arm: ArmSpec, tasks: Sequence[Task], kind: type[TextResult]
    ) -> tuple[list[TextResult], Timings]:
        """Results in the order of the texts. A text is a group of its own: they need not share a batch."""
        started = time.monotonic()
        results: dict[int, TextResult] = {}
        async for (index, _), result in run_groups(call, [[(arm, task)] for task in tasks]):
            if not isinstance(result, kind):
                raise TypeError(f"the engine answered {type(result).__name__} instead of {kind.__name__}")
            results[index] = result
        ordered = [results[index] for index in range(len(tasks))]
        return ordered, messages.joint_timings([row.timings for row in ordered], time.monotonic() - started)


def require_generator(engine: EnginePort) -> None:
    """Refuses to generate with a base that is an encoder."""
    if engine.base.kind == "encoder":
        raise TaskMismatch("The base is an encoder and generates no text; it classifies and embeds.")


async def _pieces(call: Call) -> AsyncIterator[Delta | GenerateResult]:
    """Deltas, then the result. Deltas that wait for a slow caller are joined, so that few messages catch up."""
    while True:
        _, event = await call.hear()
        texts: list[str] = []
        token_ids: list[int] = []
        chances: list[PositionChances] = []
        while isinstance(event, Delta):
            texts.append(event.text)
            token_ids += event.token_ids
            chances += event.chances
            waiting = call.hear_now()
            if waiting is None:
                break
            _, event = waiting
        if texts:
            yield Delta(text="".join(texts), token_ids=tuple(token_ids), chances=tuple(chances))
        if isinstance(event, AdapterbayError):
            raise event
        if isinstance(event, GenerateResult):
            yield event
            return
