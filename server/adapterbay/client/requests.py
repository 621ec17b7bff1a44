"""Keyword arguments to request messages: pure, shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from adapterbay.client.errors import RequestError
from adapterbay.client.fusion import FusionLike
from adapterbay.client.making import Ordered, made, several, shown, strings
from adapterbay.client.selection import Selection, selected
from adapterbay.v1 import inference_pb2, types_pb2

Messages = Sequence[Mapping[str, str]]

_OF_A_MESSAGE = {"role", "content"}
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
    stop: Sequence[str] | None
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
    stop: Sequence[str] | None = None,
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
        stop=() if stop is None else strings(stop, "stop"),
        ignore_end=ignore_end,
    )


def conversation(messages: Messages, name: str = "messages") -> types_pb2.Conversation:
    """A conversation from mappings with `role` and `content`; nothing else that they hold would be sent.

    `name` is what errors call it. Raises TypeError, or RequestError for a mapping with other keys.
    """
    entries = several(messages, name, "{'role': …, 'content': …}")
    return types_pb2.Conversation(messages=[_message(name, index, message) for index, message in enumerate(entries)])


def _message(name: str, index: int, message: Mapping[str, str]) -> types_pb2.ChatMessage:
    if not isinstance(message, Mapping) or message.keys() != _OF_A_MESSAGE:
        raise RequestError(f"{name}[{index}] must have `role` and `content`, and nothing else; it is {shown(message)}.")
    return made(types_pb2.ChatMessage, f"{name}[{index}].", role=message["role"], content=message["content"])


def _log_probabilities(top: int | None) -> inference_pb2.LogProbabilityOptions | None:
    if top is None:
        return None
    try:
        return made(inference_pb2.LogProbabilityOptions, top=top)
    except (TypeError, RequestError) as error:
        raise type(error)(str(error).replace("top", "log_probabilities", 1)) from None


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
    stop: Sequence[str] | None = None,
    ignore_end: bool = False,
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest. Raises ValueError unless there is exactly one of a prompt and messages."""
    if (prompt is None) == (messages is None):
        raise ValueError("Give either a prompt or messages.")
    return made(
        inference_pb2.GenerateRequest,
        prompt=prompt,
        conversation=None if messages is None else conversation(messages),
        **selected(adapter, fusion, base),
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
    texts: Ordered[str],
    *,
    adapter: str | None = None,
    fusion: FusionLike | None = None,
    base: bool = False,
    truncate: bool = False,
) -> inference_pb2.ClassifyRequest:
    """A ClassifyRequest."""
    selection = selected(adapter, fusion, base)
    return made(inference_pb2.ClassifyRequest, **selection, texts=strings(texts, "texts"), truncate=truncate)


def classify_tokens(
    texts: Ordered[str],
    *,
    adapter: str | None = None,
    fusion: FusionLike | None = None,
    base: bool = False,
    truncate: bool = False,
    scores: bool = False,
) -> inference_pb2.ClassifyTokensRequest:
    """A ClassifyTokensRequest."""
    selection = selected(adapter, fusion, base)
    return made(
        inference_pb2.ClassifyTokensRequest,
        **selection,
        texts=strings(texts, "texts"),
        truncate=truncate,
        scores=scores,
    )


def embed(
    texts: Ordered[str],
    *,
    adapter: str | None = None,
    fusion: FusionLike | None = None,
    base: bool = False,
    pooling: str = "mean",
    normalize: bool = False,
    truncate: bool = False,
) -> inference_pb2.EmbedRequest:
    """An EmbedRequest. `pooling` is "mean", "first" or "last"."""
    if not isinstance(pooling, str):
        raise TypeError(f"pooling takes one of {', '.join(POOLINGS)}, not {shown(pooling)}.")
    if pooling not in POOLINGS:
        raise RequestError(f"pooling is {shown(pooling)}; it must be one of {', '.join(POOLINGS)}.")
    return made(
        inference_pb2.EmbedRequest,
        **selected(adapter, fusion, base),
        texts=strings(texts, "texts"),
        pooling=POOLINGS[pooling],
        normalize=normalize,
        truncate=truncate,
    )


def compare_generate(
    arms: Ordered[Selection | str],
    inputs: Ordered[str | Messages],
    *,
    log_probabilities: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] | None = None,
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
    read = [_input(f"inputs[{place}]", entry) for place, entry in enumerate(several(inputs, "inputs", "prompts"))]
    return inference_pb2.CompareRequest(arms=_arms(arms), inputs=read, generate=task)


def compare_classify(
    arms: Ordered[Selection | str], texts: Ordered[str], *, truncate: bool = False
) -> inference_pb2.CompareRequest:
    """A CompareRequest that classifies."""
    task = made(inference_pb2.ClassifyTask, truncate=truncate)
    inputs = [_text(f"texts[{place}]", text) for place, text in enumerate(strings(texts, "texts"))]
    return inference_pb2.CompareRequest(arms=_arms(arms), inputs=inputs, classify=task)


def _arms(arms: Ordered[Selection | str]) -> list[inference_pb2.Arm]:
    return [_arm(f"arms[{place}]", arm) for place, arm in enumerate(several(arms, "arms"))]


def _arm(name: str, arm: Selection | str) -> inference_pb2.Arm:
    if not isinstance(arm, str | Selection):
        raise TypeError(f"{name} takes a Selection or its text, not {shown(arm)}.")
    try:
        selection = Selection.of(arm)
    except ValueError as error:
        raise RequestError(f"{name}: {error}") from None
    return made(inference_pb2.Arm, f"{name}.", **selection.fields())


def _input(name: str, entry: str | Messages) -> inference_pb2.CompareInput:
    if isinstance(entry, str):
        return _text(name, entry)
    if not isinstance(entry, Iterable) or isinstance(entry, Mapping | bytes):
        raise TypeError(f"{name} takes a prompt, or a sequence of {{'role': …, 'content': …}}, not {shown(entry)}.")
    return inference_pb2.CompareInput(conversation=conversation(entry, name))


def _text(name: str, text: str) -> inference_pb2.CompareInput:
    try:
        return inference_pb2.CompareInput(text=text)
    except UnicodeError:
        raise RequestError(f"{name} holds characters that UTF-8 has not: {shown(text)}.") from None
