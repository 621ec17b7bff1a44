"""Requests to specs: pure checks of everything that can be wrong in a message by itself.

Every InvalidArgument names the field by its path in the request, for instance `fusion.adapters[1].weight`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapterbay.registry.errors import InvalidArgument
from adapterbay.server.requests import Pooling, SamplingSpec
from adapterbay.v1 import inference_pb2, types_pb2

MAX_STOPS = 16
MAX_TEMPERATURE = 100.0
MAX_TOP_LOG_PROBABILITIES = 100
MIN_ARMS, MAX_ARMS = 2, 16
MAX_INPUTS = 10_000
ROLES = ("system", "user", "assistant")
POOLINGS = {
    inference_pb2.POOLING_UNSPECIFIED: Pooling.MEAN,
    inference_pb2.POOLING_MEAN: Pooling.MEAN,
    inference_pb2.POOLING_FIRST: Pooling.FIRST,
    inference_pb2.POOLING_LAST: Pooling.LAST,
}

GenerateMessage = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest


def read_sampling(
    sampling: inference_pb2.Sampling,
    log_probabilities: inference_pb2.LogProbabilityOptions | None,
    prefix: str = "",
) -> SamplingSpec:
    """Sampling settings. `log_probabilities` is None where the request has none; `prefix` ends with a dot."""

    def refuse(name: str, why: str) -> InvalidArgument:
        return InvalidArgument(f"`{name}` {why}", field=f"{prefix}sampling.{name}")

    temperature = sampling.temperature
    if not math.isfinite(temperature) or not 0 <= temperature <= MAX_TEMPERATURE:
        raise refuse("temperature", f"is {temperature:g}; it must be between 0 (greedy) and {MAX_TEMPERATURE:g}.")
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise refuse("max_tokens", f"is {sampling.max_tokens}; it must be at least 1.")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:  # NaN fails too
        raise refuse("top_p", f"is {sampling.top_p:g}; it must be above 0 and at most 1.")
    if sampling.HasField("top_k") and sampling.top_k < 1:
        raise refuse("top_k", f"is {sampling.top_k}; it must be at least 1.")
    for name in ("top_p", "top_k"):
        if temperature == 0 and sampling.HasField(name):
            raise refuse(name, "contradicts temperature 0, which is greedy; set a temperature or leave it out.")
    if len(sampling.stop) > MAX_STOPS:
        raise refuse("stop", f"has {len(sampling.stop)} strings; at most {MAX_STOPS} are taken.")
    for index, stop in enumerate(sampling.stop):
        if not stop:
            raise InvalidArgument("A stop string is empty.", field=f"{prefix}sampling.stop[{index}]")
    top = None if log_probabilities is None else log_probabilities.top
    if top is not None and top > MAX_TOP_LOG_PROBABILITIES:
        raise InvalidArgument(
            f"`top` is {top}; at most {MAX_TOP_LOG_PROBABILITIES} alternatives are reported.",
            field=f"{prefix}log_probabilities.top",
        )
    return SamplingSpec(
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        temperature=temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k if sampling.HasField("top_k") else 0,
        seed=sampling.seed if sampling.HasField("seed") else None,
        stop=tuple(sampling.stop),
        ignore_end=sampling.ignore_end,
        top_log_probabilities=top,
    )


def read_conversation(conversation: types_pb2.Conversation, field: str) -> list[dict[str, str]]:
    """The messages as the chat template takes them."""
    if not conversation.messages:
        raise InvalidArgument("The conversation has no messages.", field=f"{field}.messages")
    for index, message in enumerate(conversation.messages):
        if message.role not in ROLES:
            raise InvalidArgument(
                f"The role {message.role!r} is not known; it must be one of {', '.join(ROLES)}.",
                field=f"{field}.messages[{index}].role",
            )
        if not message.content:
            raise InvalidArgument("The message has no content.", field=f"{field}.messages[{index}].content")
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def read_texts(texts: Sequence[str]) -> list[str]:
    """Texts to label or embed: at least one, none empty or blank."""
    if not texts:
        raise InvalidArgument("There is no text.", field="texts")
    for index, text in enumerate(texts):
        require_text(text, f"texts[{index}]")
    return list(texts)


def require_text(text: str, field: str) -> None:
    """Refuses a text that is empty or blank."""
    if not text.strip():
        raise InvalidArgument("The text is empty.", field=field)


def require_prompt(prompt: str, field: str) -> None:
    """Refuses an empty prompt. A blank one is a prompt."""
    if not prompt:
        raise InvalidArgument("The prompt is empty.", field=field)


def read_pooling(pooling: inference_pb2.Pooling.ValueType) -> Pooling:
    """How to pool; unspecified is the mean."""
    if pooling not in POOLINGS:
        raise InvalidArgument(f"Pooling number {pooling} is not known.", field="pooling")
    return POOLINGS[pooling]


def check_comparison(request: inference_pb2.CompareRequest) -> None:
    """The shape of a comparison: how many arms and inputs, and inputs that suit the task."""
    if not MIN_ARMS <= len(request.arms) <= MAX_ARMS:
        raise InvalidArgument(
            f"A comparison takes {MIN_ARMS} to {MAX_ARMS} arms, not {len(request.arms)}.", field="arms"
        )
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise InvalidArgument(
            f"A comparison takes 1 to {MAX_INPUTS:,} inputs, not {len(request.inputs):,}.", field="inputs"
        )
    task = request.WhichOneof("task")
    if task is None:
        raise InvalidArgument("The comparison has no task: set `generate` or `classify`.", field="task")
    for index, entry in enumerate(request.inputs):
        which = entry.WhichOneof("input")
        if which is None:
            raise InvalidArgument("The input is neither a text nor a conversation.", field=f"inputs[{index}].input")
        if which == "conversation" and task == "classify":
            raise InvalidArgument(
                "A conversation cannot be classified; send its text.", field=f"inputs[{index}].conversation"
            )
        if which == "text" and task == "classify":
            require_text(entry.text, f"inputs[{index}].text")
