"""Keyword arguments to request messages: pure, shared by both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeVar

from adapterbay.client.errors import RequestError
from adapterbay.client.fusion import FusionLike
from adapterbay.client.making import made
from adapterbay.client.selection import Selection
from adapterbay.v1 import inference_pb2, types_pb2

Messages = Sequence[Mapping[str, str]]
T = TypeVar("T")

POOLINGS = {
    "mean": inference_pb2.POOLING_MEAN,
    "first": inference_pb2.POOLING_FIRST,
    "last": inference_pb2.POOLING_LAST,
}


class SelectionOptions(TypedDict, total=False):
    """What should answer; exactly one."""

    adapter: str | None
    fusion: FusionLike | None
    base: bool


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen. `log_probabilities` is how many alternatives to report at each position, 0 for none."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str]
    ignore_end: bool
    log_probabilities: int | None


class GenerateOptions(SelectionOptions, SamplingOptions, total=False):
    """Options of a generation. `messages` is a conversation, instead of a prompt."""

    messages: Messages | None


def sampling(
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_end: bool = False,
) -> inference_pb2.Sampling:
    """Sampling settings; None leaves the server's default."""
    return made(
        inference_pb2.Sampling,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=_several(stop, "stop"),
        ignore_end=ignore_end,
    )


def conversation(messages: Messages) -> types_pb2.Conversation:
    """A conversation from mappings with `role` and `content`; nothing else that they hold would be sent."""
    if isinstance(messages, str | Mapping):
        raise TypeError("messages takes a sequence of {'role': …, 'content': …}, not one of them.")
    return types_pb2.Conversation(messages=[_message(index, message) for index, message in enumerate(messages)])


def _message(index: int, message: Mapping[str, str]) -> types_pb2.ChatMessage:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise RequestError(f"messages[{index}] must have `role` and `content`, and nothing else.")
    return made(types_pb2.ChatMessage, **message)


def _several(values: Sequence[T], name: str) -> Sequence[T]:
    """Values that must be a sequence of strings: one string would be taken for its characters."""
    if isinstance(values, str):
        raise TypeError(f"{name} takes a sequence of strings, not one string.")
    return values


def _log_probabilities(top: int | None) -> inference_pb2.LogProbabilityOptions | None:
    return None if top is None else made(inference_pb2.LogProbabilityOptions, top=top)


def generate(
    prompt: str | None,
    *,
    messages: Messages | None = None,
    adapter: str | None = None,
    fusion: FusionLike | None = None,
    base: bool = False,
    log_probabilities: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_end: bool = False,
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest. Raises ValueError unless there is exactly one of a prompt and messages."""
    if (prompt is None) == (messages is None):
        raise ValueError("Give either a prompt or messages.")
    return made(
        inference_pb2.GenerateRequest,
        prompt=prompt,
        conversation=None if messages is None else conversation(messages),
        **Selection(adapter, fusion, base).fields(),
        sampling=sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            ignore_end=ignore_end,
        ),
        log_probabilities=_log_probabilities(log_probabilities),
    )


def streamed(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateStreamRequest:
    """The same request for streaming: both messages have the same fields, which a test of the contract holds."""
    return inference_pb2.GenerateStreamRequest.FromString(request.SerializeToString())


def classify(
    texts: Sequence[str],
    *,
    adapter: str | None = None,
    fusion: FusionLike | None = None,
    base: bool = False,
    truncate: bool = False,
) -> inference_pb2.ClassifyRequest:
    """A ClassifyRequest."""
    selection = Selection(adapter, fusion, base)
    return made(inference_pb2.ClassifyRequest, **selection.fields(), texts=_several(texts, "texts"), truncate=truncate)


def classify_tokens(
    texts: Sequence[str],
    *,
    adapter: str | None = None,
    fusion: FusionLike | None = None,
    base: bool = False,
    truncate: bool = False,
    scores: bool = False,
) -> inference_pb2.ClassifyTokensRequest:
    """A ClassifyTokensRequest."""
    selection = Selection(adapter, fusion, base)
    return made(
        inference_pb2.ClassifyTokensRequest,
        **selection.fields(),
        texts=_several(texts, "texts"),
        truncate=truncate,
        scores=scores,
    )


def embed(
    texts: Sequence[str],
    *,
    adapter: str | None = None,
    fusion: FusionLike | None = None,
    base: bool = False,
    pooling: str = "mean",
    normalize: bool = False,
    truncate: bool = False,
) -> inference_pb2.EmbedRequest:
    """An EmbedRequest. `pooling` is "mean", "first" or "last"."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}.")
    return made(
        inference_pb2.EmbedRequest,
        **Selection(adapter, fusion, base).fields(),
        texts=_several(texts, "texts"),
        pooling=POOLINGS[pooling],
        normalize=normalize,
        truncate=truncate,
    )


def compare_generate(
    arms: Sequence[Selection | str],
    inputs: Sequence[str | Messages],
    *,
    log_probabilities: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_end: bool = False,
) -> inference_pb2.CompareRequest:
    """A CompareRequest that generates. An input is a prompt or a conversation."""
    task = inference_pb2.GenerateTask(
        sampling=sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            ignore_end=ignore_end,
        ),
        log_probabilities=_log_probabilities(log_probabilities),
    )
    return inference_pb2.CompareRequest(arms=_arms(arms), inputs=_inputs(inputs), generate=task)


def compare_classify(
    arms: Sequence[Selection | str], inputs: Sequence[str], *, truncate: bool = False
) -> inference_pb2.CompareRequest:
    """A CompareRequest that classifies."""
    task = inference_pb2.ClassifyTask(truncate=truncate)
    return inference_pb2.CompareRequest(arms=_arms(arms), inputs=_inputs(inputs), classify=task)


def _arms(arms: Sequence[Selection | str]) -> list[inference_pb2.Arm]:
    return [made(inference_pb2.Arm, **Selection.of(arm).fields()) for arm in _several(arms, "arms")]


def _inputs(inputs: Sequence[str | Messages]) -> list[inference_pb2.CompareInput]:
    return [_input(entry) for entry in _several(inputs, "inputs")]


def _input(entry: str | Messages) -> inference_pb2.CompareInput:
    if isinstance(entry, str):
        return made(inference_pb2.CompareInput, text=entry)
    return inference_pb2.CompareInput(conversation=conversation(entry))
