"""What a hasty caller passes: every wrong argument is named before anything is sent, by both clients."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from adapterbay.client import AsyncClient, Client, ClientError, Fusion, RequestError, Selection, WeightedAdapter
from adapterbay.client.errors import from_status
from adapterbay.client.requests import (
    classify,
    compare_classify,
    compare_generate,
    generate,
)
from adapterbay.client.retry import FOR_EVER_SECONDS, Deadline

DIGEST = "sha256:" + "1" * 64
Wrong = Callable[[], object]


def sent(**options: Any) -> Wrong:
    return lambda: generate("a", **{"adapter": "tales", **options})


UNSENDABLE: dict[str, tuple[Wrong, str]] = {
    "max_tokens": (sent(max_tokens=10**14), "max_tokens is 100000000000000; it must be at most 2147483647."),
    "seed": (sent(seed=-1), "seed is -1; it must be at least 0."),
    "log_probabilities": (sent(log_probabilities=-1), "log_probabilities is -1"),
    "surrogate": (lambda: generate("a\ud800", base=True), r"prompt holds characters that UTF-8 has not: 'a\ud800'"),
    "surrogate in a text": (lambda: classify(["a", "\udcff"], adapter="a"), "texts[1] holds characters"),
    "surrogate in a name": (lambda: generate("a", adapter="\udcff"), "adapter holds characters"),
    "rank": (lambda: Selection(fusion="svd(a:1+b:1, rank=-1)").fields(), "rank is -1"),
    "no content": (lambda: generate(None, messages=[{"role": "user"}], base=True), "messages[0] must have `role`"),
    "a name": (
        lambda: generate(None, messages=[{"role": "user", "content": "a", "name": "b"}], base=True),
        "and nothing else",
    ),
    "no address": (lambda: Client(""), "address is empty; give HOST:PORT"),
    "a URL": (lambda: Client("http://127.0.0.1:1"), "give HOST:PORT alone"),
    "a URL, asyncio": (lambda: AsyncClient("https://host"), "give HOST:PORT alone"),
    "timeout": (lambda: Deadline(math.nan, None), "timeout is nan"),
}
OF_WRONG_TYPES: dict[str, tuple[Wrong, str]] = {
    "max_tokens": (sent(max_tokens="5"), "max_tokens takes a whole number, not '5'."),
    "half a token": (sent(max_tokens=5.5), "max_tokens takes a whole number, not 5.5."),
    "a number of true": (sent(top_k=True), "top_k takes a whole number, not True."),
    "temperature": (sent(temperature="hot"), "temperature takes a number, not 'hot'."),
    "ignore_end": (sent(ignore_end="yes"), "ignore_end takes True or False, not 'yes'."),
    "one stop": (sent(stop="end"), "stop takes a sequence of strings, not one string."),
    "a stop": (sent(stop=["a", 3]), "stop[1] takes text, not 3."),
    "stops": (sent(stop=3), "stop takes a sequence of strings, not 3."),
    "prompts": (lambda: generate(["a"], base=True), "prompt takes text, not ['a']."),  # type: ignore[arg-type]
    "adapter": (sent(adapter=3), "adapter takes text, not 3."),
    "fusion": (lambda: generate("a", fusion=["a", "b"]), "fusion takes {'NAME': weight}"),  # type: ignore[arg-type]
    "weight": (lambda: Fusion.of({"a": None}), "The weight of 'a' is None; it must be a number."),  # type: ignore[dict-item]
    "one text": (lambda: classify("a", adapter="a"), "texts takes a sequence of strings, not one string."),
    "texts": (lambda: classify(["a", None], adapter="a"), "texts[1] takes text, not None."),  # type: ignore[list-item]
    "one arm": (lambda: compare_generate("tales", ["a"]), "arms takes a sequence of strings, not one string."),
    "one input": (lambda: compare_classify(["a", "b"], "a"), "texts takes a sequence of strings, not one string."),
    "messages": (lambda: generate(None, messages="a", base=True), "messages takes a sequence"),  # type: ignore[arg-type]
    "parts": (
        lambda: generate(None, messages=[{"role": "user", "content": [{"text": "a"}]}], base=True),  # type: ignore[dict-item]
        "content takes text, not [{'text': 'a'}].",
    ),
    "address": (lambda: Client(None), "address takes HOST:PORT as text, not None."),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("wrong", "words"), UNSENDABLE.values(), ids=UNSENDABLE)
def test_what_cannot_be_sent_is_named(wrong: Wrong, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)) as caught:
        wrong()
    assert isinstance(caught.value, ClientError)
    assert isinstance(caught.value, ValueError), "what such arguments raised before there was a RequestError"


@pytest.mark.parametrize(("wrong", "words"), OF_WRONG_TYPES.values(), ids=OF_WRONG_TYPES)
def test_a_wrong_type_is_named(wrong: Wrong, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        wrong()


def test_a_fusion_is_no_adapter_and_half_a_digest_is_no_weight() -> None:
    with pytest.raises(ValueError, match="a fusion goes into fusion="):
        generate("a", adapter="tales:1+songs:1")
    for reference in ("tales@sha256:1234", f"tales@{DIGEST}", "hub:org/repo@main"):
        assert Selection.parse(reference) == Selection(adapter=reference), "the server says what is wrong with it"
    assert Selection.parse("tales@sha256:12:0.5") == Selection(fusion={"tales@sha256:12": 0.5})
    assert WeightedAdapter.parse(f"tales@{DIGEST}:2").reference == f"tales@{DIGEST}"


def test_long_timeouts_are_none_and_local_deadlines_have_words() -> None:
    assert Deadline(FOR_EVER_SECONDS * 10, 1.0).remaining() is None, "gRPC would take it for the past"
    left = Deadline(FOR_EVER_SECONDS, None).remaining()
    assert left is not None
    assert left > FOR_EVER_SECONDS - 60
    for words in ("Deadline Exceeded", "Stream removed (Deadline Exceeded)"):
        assert str(from_status(grpc.StatusCode.DEADLINE_EXCEEDED, words, None)) == "The call's deadline passed."


def test_the_asyncio_client_names_them_too() -> None:
    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            await client.generate("a", base=True, seed=-1)

    with pytest.raises(RequestError, match="seed is -1"):
        asyncio.run(ask())


def test_a_number_that_no_float_holds_is_named() -> None:
    with pytest.raises(RequestError, match="temperature is 1000"):
        generate("a", base=True, temperature=10**400)
